"""Kills two writers of one sample store at random moments, again and again, and prints what was lost.

    python tests/killing.py STORE KILLS [SEED]

A process of its own, so that it may fork: a writer then starts in milliseconds.
"""

import json
import os
import random
import signal
import sqlite3
import sys
import time
from contextlib import closing
from pathlib import Path

from ppf.samples import Sample, SampleStore


def write(path: Path, start: int, told: int) -> None:
    """Adds samples for ever, and tells each when it is committed."""
    store = SampleStore(path, "c", write=True)
    for index in range(start, start + 10**6):
        digest = f"{index:032d}"
        store.add(Sample("c", digest, "spread", 0.3, (index, 2), bytes(9), "done", "", 2.5, index / 7, 4096, 0.1))
        os.write(told, f"{digest}\n".encode())


def writer(path: Path, start: int, told: int) -> int:
    """A writer in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            write(path, start, told)
        finally:
            os._exit(1)
    return pid


def kill_twice(path: Path, round: int, seconds: float) -> tuple[list[str], int]:
    """Starts two writers and kills both; what they told, and how many were killed in their work."""
    heard, told = os.pipe()
    pids = [writer(path, (2 * round + lane) * 10**6, told) for lane in (0, 1)]
    os.close(told)
    time.sleep(seconds)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    killed = sum(os.WIFSIGNALED(os.waitpid(pid, 0)[1]) for pid in pids)
    with os.fdopen(heard) as file:
        return [line.strip() for line in file if line.endswith("\n")], killed


def campaign(path: Path, kills: int, seed: int) -> dict[str, object]:
    """The counts."""
    rng, acknowledged, killed = random.Random(seed), set[str](), 0
    for round in range(kills):
        told, dead = kill_twice(path, round, rng.uniform(0.0, 0.15))
        acknowledged.update(told)
        killed += dead
    with closing(SampleStore(path, "c", write=True)) as store:
        stored = [sample.digest for sample in store.all()]
        damaged = store.damaged
    with closing(sqlite3.connect(path)) as db:
        integrity = db.execute("PRAGMA integrity_check").fetchone()[0]
    return {
        "killed": killed, "acknowledged": len(acknowledged), "stored": len(stored), "lost": len(acknowledged - set(stored)),
        "twice": len(stored) - len(set(stored)), "damaged": damaged, "integrity": integrity,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(campaign(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)))
