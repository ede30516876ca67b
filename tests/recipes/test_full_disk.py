"""A whole fit on a disk that is really full. Needs unshare and mount, and for them root or a user namespace."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import ppf

WAYS = (("unshare", "-m"), ("unshare", "-Urm"))


def mounts_of_its_own(place):
    """What to put before a command that mounts."""
    for way in WAYS:
        try:
            if subprocess.run([*way, "mount", "-t", "tmpfs", "none", str(place)], capture_output=True).returncode == 0:
                return way
        except FileNotFoundError:
            continue
    pytest.skip("a small disk must be mounted; neither root nor a user namespace may do it here")


def test_a_full_disk_loses_nothing_and_the_same_fit_goes_on_when_there_is_room(place, tmp_path):
    tests = Path(__file__).parents[1]
    paths = os.pathsep.join([str(Path(ppf.__file__).parents[1]), str(tests)])
    program = [sys.executable, str(tests / "full_disk.py"), str(tmp_path), str(place / "model"), str(place / "text.txt")]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*mounts_of_its_own(tmp_path), *program], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    at_first, filled, still, again, prune, policy = found.values()
    assert [one["code"] for one in found.values()] == [5, 5, 5, 0, 5, 0], found
    assert "must have room for 96,256 bytes" in at_first["said"] and " are free" in at_first["said"]
    assert at_first["seconds"] < 1.0 and at_first["left"] == ["ballast"]
    for one in (filled, still, prune):
        assert one["said"].startswith("error: ") and one["said"].count("; ") >= 2 and "Traceback" not in one["said"]
        assert "full" in one["said"] or "No space left" in one["said"] or "must have room for" in one["said"]
    assert len(filled["samples"]) >= 20 and still["samples"] == filled["samples"]
    assert again["samples"][: len(filled["samples"])] == filled["samples"] and len(again["samples"]) > 45
