"""A kill, and an error, at every system call that writes: what is there afterwards is the old or the new, whole. Needs strace."""

import errno
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ppf
from builders import names_in
from ppf.artifact import load_artifact

CALLS = ("write", "fsync", "rename", "renameat2", "mkdir", "unlink", "unlinkat", "rmdir", "chmod")
PROGRAM = """
import sys
from pathlib import Path
import numpy as np
from ppf.artifact import atomic_folder, save_artifact
from ppf.errors import PPFError
place, what = Path(sys.argv[1]), sys.argv[2]
try:
    save_artifact(place / "file", "k", "f", {"x": np.arange(9.0)}, what=what)
    with atomic_folder(place / "folder", force=True) as folder:
        (folder / "ppf.json").write_text(what)
        save_artifact(folder / "inner", "k", "f", {"x": np.arange(9.0)}, what=what)
except PPFError as error:
    sys.exit(str(error) if error.exit_code == 5 else "another kind")
"""


def run(place, what, *options):
    """The program, under strace if options are given."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(ppf.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
    python = [sys.executable, "-B", "-X", "frozen_modules=on", "-c", PROGRAM, str(place), what]
    command = ["strace", "-f", "-qq", "-o", str(place.parent / "trace"), *options, *python] if options else python
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.fixture
def place(tmp_path):
    """Where an earlier run wrote."""
    (tmp_path / "place").mkdir()
    assert run(tmp_path / "place", "old").returncode == 0
    return tmp_path / "place"


def points(place):
    """Every (call, number) that the program makes in replacing what an earlier run wrote, each with a place of its own."""
    dry = shutil.copytree(place, place.parent / "dry")
    assert run(dry, "new", "-e", "trace=" + ",".join(CALLS)).returncode == 0
    made = re.findall(r"^\d+ +(\w+)\(", (place.parent / "trace").read_text(), re.MULTILINE)
    assert len(made) > 15 and "fsync" in made and {"rename", "renameat2"} & set(made)
    for call in CALLS:
        for number in range(1, made.count(call) + 1):
            yield call, number, shutil.copytree(place, place.parent / f"{call} {number}")


def what_is_in(place):
    """What the file and the folder hold; raises if either is not whole."""
    _, of_file = load_artifact(place / "file", "k", "f")
    _, of_inner = load_artifact(place / "folder" / "inner", "k", "f")
    assert (place / "folder" / "ppf.json").read_text() == of_inner["what"] and names_in(place / "folder") == ["inner", "ppf.json"]
    return of_file["what"], of_inner["what"]


def workplaces(place):
    return [name for name in names_in(place) if name.startswith(".folder")]


def test_a_kill_at_any_call_leaves_the_old_or_the_new(place):
    seen, left = set(), []
    for call, number, here in points(place):
        killed = run(here, "new", "-e", f"inject={call}:signal=KILL:when={number}")
        assert killed.returncode != 0, (call, number)
        seen.add(what_is_in(here))
        left += [here] if workplaces(here) else []
    assert seen == {("old", "old"), ("new", "old"), ("new", "new")}
    for here in (left[0], left[-1]):
        assert run(here, "new").returncode == 0 and what_is_in(here) == ("new", "new") and not workplaces(here)


ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT", "EACCES")
EACH = [(error, lasting) for error in ERRORS for lasting in (False, True)]


@pytest.mark.parametrize(
    "kinds", [EACH, *(pytest.param([kind], marks=pytest.mark.slow, id=f"{kind[0]} {kind[1]}") for kind in EACH)]
)
def test_an_error_at_any_call_is_said_and_leaves_the_old_or_the_new(place, kinds):
    """Every kind of error in turn; behind ``slow`` each at every call."""
    failed = 0
    for (call, number, here), (error, lasting) in zip(points(place), itertools.cycle(kinds), strict=False):
        done = run(here, "new", "-e", f"inject={call}:error={error}:when={number}{'+' if lasting else ''}")
        found = what_is_in(here)
        if done.returncode == 0:  # what was left out is a tidying up
            assert found == ("new", "new"), (call, number)
        else:
            failed += 1
            is_mute = lasting and call == "write"  # it cannot complain either
            assert is_mute or (os.strerror(getattr(errno, error)) in done.stderr and "Traceback" not in done.stderr), (call, number)
            assert found in {("old", "old"), ("new", "old"), ("new", "new")}, (call, number)
    assert failed > 8
