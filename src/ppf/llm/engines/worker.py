"""A worker as a process: set-up and questions come on standard input, answers go to standard output."""

import json
import os
import sys

from ppf.errors import PPFError
from ppf.llm.engines.service import READY, Service, to_refusal


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    try:
        service = Service(json.loads(sys.stdin.readline()))
        print(READY, file=answers, flush=True)
        for line in sys.stdin:
            print(service.answer(line), file=answers, flush=True)
    except PPFError as error:
        print(to_refusal(error), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
