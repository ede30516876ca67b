"""A fit on a small disk that is full at first, fills up while masks are measured, and has room again; prints what came of it.

    unshare -m python tests/full_disk.py DISK MODEL TEXT

DISK becomes a disk of 4 MB. Whoever runs this must be allowed to mount, at best where nobody else sees it.
"""

import contextlib
import io
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

from fit_runs import SETTINGS, measured
from ppf import cli

LEFT = 40_000
AT = 20
"""Samples after which the disk is filled."""


def fill(disk: Path, leave: int = 0) -> None:
    """Takes all room but some bytes."""
    with (disk / "ballast").open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    if leave:
        with (disk / "ballast").open("r+b") as file:
            file.truncate((disk / "ballast").stat().st_size - leave)


def told(words: list[str]) -> dict[str, object]:
    """What a command ends with, what it says last, and how long it takes."""
    start, said = time.perf_counter(), io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(words)
    lines = said.getvalue().strip().splitlines() or [""]
    return {"code": code, "said": lines[-1], "seconds": time.perf_counter() - start}


def fill_when_measured(disk: Path, study: Path, ended: threading.Event) -> None:
    while len(measured(study)) < AT and not ended.wait(0.005):
        pass
    fill(disk)


def campaign(disk: Path, model: str, text: str) -> dict[str, object]:
    """What each run ends with, and the samples after it."""
    study, found = disk / "study", {}
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    fit = ["fit", model, "--study", str(study), "--text", text, "--workers", "1", *flags]
    fill(disk, LEFT)
    found["full at first"] = {**told(fit), "left": sorted(path.name for path in disk.iterdir())}
    (disk / "ballast").unlink()
    ended = threading.Event()
    watch = threading.Thread(target=fill_when_measured, args=(disk, study, ended))
    watch.start()
    found["filled"] = told(fit)
    ended.set()
    watch.join()
    found["filled"]["samples"] = measured(study)
    found["still full"] = {**told(fit), "samples": measured(study)}
    (disk / "ballast").unlink()
    found["room again"] = {**told(fit), "samples": measured(study)}
    fill(disk)
    found["prune"] = told(["prune", str(study), "--ratio", "0.3", "--out", str(disk / "out")])
    found["policy"] = told(["policy", str(study), "--ratio", "0.3"])
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(place)], check=True)
    print(json.dumps(campaign(place, *sys.argv[2:])))
