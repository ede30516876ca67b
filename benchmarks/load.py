"""What does the policy API do in a minute of load, and while the same machine fits and exports the same study?

minute   eight connections for a minute: every mask compared with the library's, and how much the server grows
fit      eight connections while `ppf fit` learns the study anew with another predictor, and until the server has taken it
export   eight connections while `ppf prune` writes a checkpoint
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import json
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from live import asked
from ppf.artifact import read_json
from ppf.config import Target
from ppf.decide import Decider
from record import write

CONNECTIONS, LONGEST = 8, 600.0
PPF = [sys.executable, "-m", "ppf"]


@contextmanager
def served(study: Path) -> Iterator[tuple[int, int]]:
    """The port and the process of a server of a study's decisions."""
    with subprocess.Popen([*PPF, "serve", str(study), "--no-model", "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield int(server.stdout.readline().rsplit(":", 1)[1]), server.pid
        finally:
            server.terminate()


def resident(pid: int) -> int:
    """Bytes of memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def fits(port: int) -> int:
    """How many fits the server has answered from."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/state") as answer:
        return json.load(answer)["fits"]


def wrong(answers: list[tuple[float, bytes]], deciders: list[Decider]) -> int:
    """How many masks are none that the library decides."""
    count = 0
    for ratio, body in answers:
        kept = [site["kept"] for site in json.loads(body)["kept"]]
        count += all(kept != one.decide(Target(ratio=ratio)).allocation.kept.tolist() for one in deciders)
    return count


def minute(study: Path, seed: int, seconds: float) -> dict:
    with served(study) as (port, pid):
        asyncio.run(asked(port, CONNECTIONS, 5.0, seed + 1))  # the first requests fill pools and caches
        before, answers = resident(pid), list[tuple[float, bytes]]()
        found = asyncio.run(asked(port, CONNECTIONS, seconds, seed, answers=answers))
        grown = resident(pid) - before
    return {**found, "masks": len(answers), "wrong_masks": wrong(answers, [Decider(study)]), "resident_bytes_grown": grown}


def beside(study: Path, command: list[str], seed: int) -> dict:
    """Load while a command runs, and three seconds longer; answers may be of the study before and after it."""
    before = Decider(study)
    _ = before.chain
    with served(study) as (port, _), subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        answers, ended, start = list[tuple[float, bytes]](), list[float](), time.perf_counter()

        def is_over() -> bool:
            if process.poll() is not None and not ended:
                ended.append(time.perf_counter())
            return bool(ended) and time.perf_counter() - ended[0] > 3

        found = asyncio.run(asked(port, CONNECTIONS, LONGEST, seed, is_over, answers))
        assert process.returncode == 0, command
        spent = round(ended[0] - start, 1)
        return {
            **found,
            "command_seconds": spent,
            "fits": fits(port),
            "masks": len(answers),
            "wrong_masks": wrong(answers, [before, Decider(study)]),
        }


def fit_again(study: Path) -> list[str]:
    """The command that fitted a study, with another predictor: what was measured is there, the rest is learnt anew."""
    report = read_json(study / "report.json")
    flags: list[str] = []
    for name, value in report["settings"].items():
        if value is not None and name not in ("model", "study", "predictor"):
            flags += [f"--{name.replace('_', '-')}", str(value)]
    other = "additive" if report["predictor"] != "additive" else "corrected"
    return [*PPF, "fit", report["settings"]["model"], "--study", str(study), "--predictor", other, *flags]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", required=True, help="a fitted study; it is copied")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        study = Path(shutil.copytree(arguments.study, Path(place) / "study"))
        prune = [*PPF, "prune", str(study), "--ratio", "0.3", "--out", str(Path(place) / "out")]
        found = {
            "load_average": round(os.getloadavg()[0], 2),
            "minute": minute(study, arguments.seed, arguments.seconds),
            "export": beside(study, prune, arguments.seed),
            "fit": beside(study, fit_again(study), arguments.seed),
        }
    write("load", arguments.seed, found)
