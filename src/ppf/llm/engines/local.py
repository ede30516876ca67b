"""A pool of one-thread processes on this machine.

A worker is a plain `python -m ppf.llm.engines.worker` that speaks JSON lines over its pipes: nothing is pickled, a script
needs no main guard, and one whose pipe closes, as when its parent dies, ends after the mask in hand.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from ppf.errors import ResourceError
from ppf.llm.engines.pool import Pool, Worker
from ppf.llm.engines.service import ENVIRONMENT
from ppf.space.layout import Layout


class LocalEngine(Pool["_Process"]):
    """A pool of one-thread processes, each with the model.

    Args:
        folder: Of the model's files.
        text: Artefact of the text to measure on.
        layout: Of the dense model.
        dtype: Torch dtype to measure in, by name.
        workers: How many processes.
        tokens_per_batch: As in ``Bench``.

    Raises:
        ResourceError: A process cannot be started.
    """

    def __init__(self, folder: Path, text: Path, layout: Layout, dtype: str, workers: int, tokens_per_batch: int) -> None:
        super().__init__()
        setup = {
            "folder": str(folder),
            "text": str(text),
            "layout": layout.to_json(),
            "dtype": dtype,
            "device": "cpu",
            "tokens_per_batch": tokens_per_batch,
        }
        try:
            for _ in range(workers):
                self.workers.append(_Process(setup))
        except BaseException:
            self.close()
            raise

    def heard(self) -> Sequence["_Process"]:
        """See ``Pool``."""
        ready = wait([worker.answers.fileno() for worker in self.workers])
        return [worker for worker in self.workers if worker.answers.fileno() in ready]


class _Process(Worker):
    """One process."""

    def __init__(self, setup: dict[str, Any]) -> None:
        super().__init__()
        self._setup = json.dumps(setup)
        self.start()

    def start(self) -> None:
        path = os.pathsep.join([str(Path(__file__).parents[3]), *filter(None, [os.environ.get("PYTHONPATH")])])
        with contextlib.ExitStack() as on_error:
            try:
                self._errors = on_error.enter_context(tempfile.TemporaryFile())
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "ppf.llm.engines.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
                    start_new_session=True,
                )
            except OSError as error:
                reason = f"{error.strerror}; free memory or give fewer --workers"
                raise ResourceError(f"a measuring process must start; {reason}") from error
            on_error.pop_all()
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._questions, self.answers = self._process.stdin, self._process.stdout
        self.send(self._setup)

    def send(self, question: str) -> None:
        try:
            self._questions.write((question + "\n").encode())
            self._questions.flush()
        except BrokenPipeError:
            pass  # its end is seen when its answer is read

    def receive(self) -> bytes | None:
        line = self.answers.readline()
        return line if line.endswith(b"\n") else None

    def last_words(self) -> tuple[str, bool]:
        """The last line that the process wrote to its error stream, and how it ended."""
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        return f"{lines[-1][:200] if lines else 'no message'} (status {status})", status >= 0

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # what a dead process did not read
            self._questions.close()
        self.answers.close()
        self._errors.close()
