"""A repair that is killed, at any of its calls of the system."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ppf
from builders import names_in
from ppf.repair import repair
from stores_made import cut_off, samples_of, zero

UNDO = "import sys, pathlib; from ppf.repair import repair; repair(pathlib.Path(sys.argv[1]))"
CALLS = (
    "write",
    "pwrite64",
    "ftruncate",
    "fsync",
    "fdatasync",
    "rename",
    "unlink",
    "rmdir",
    "mkdir",
    "copy_file_range",
    "sendfile",
)


@pytest.mark.parametrize("damage", ["a write is cut off", pytest.param("a page is gone", marks=pytest.mark.slow)])
def test_a_kill_at_any_call_of_a_repair_makes_nothing_worse(copy, tmp_path, damage):
    """Needs strace."""
    is_cut = damage == "a write is cut off"
    cut_off(copy / "samples.sqlite") if is_cut else zero(copy / "samples.sqlite", 0)

    def run(folder, *options):
        command = ["strace", "-f", "-qq", "-o", str(tmp_path / "trace"), *options, sys.executable, "-c", UNDO, str(folder)]
        environment = {**os.environ, "PYTHONPATH": str(Path(ppf.__file__).parents[1]), "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    assert run(shutil.copytree(copy, tmp_path / "dry"), "-e", "trace=" + ",".join(CALLS)).returncode == 0
    made = re.findall(r"^\d+ +(\w+)\(", (tmp_path / "trace").read_text(), re.MULTILINE)
    assert {"pwrite64", "rename", "unlink"} <= set(made) and len(made) > 12
    wanted = set(samples_of(tmp_path / "dry"))
    assert len(wanted) > 40
    for call in sorted(set(made)):
        for number in range(1, made.count(call) + 1, 1 + made.count(call) // 12):
            here = Path(shutil.copytree(copy, tmp_path / f"{call} {number}"))
            assert run(here, "-e", f"inject={call}:signal=KILL:when={number}").returncode != 0, (call, number)
            again_aside = repair(here)["aside"]
            assert set(samples_of(here)) == wanted and (again_aside == [] or not is_cut), (call, number)
            assert not [name for name in names_in(here) if ".ppf-" in name or "journal" in name], (call, number)
