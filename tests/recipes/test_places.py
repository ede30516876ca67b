"""Places where nothing can be written are refused before anything heavy is imported, and a study there can still be read."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import ppf
from builders import refuses
from fit_runs import measured
from ppf.commands import check_places
from ppf.config import FitConfig
from ppf.errors import ResourceError

READ_ONLY = ("strace", "-f", "-qq", "-e", "trace=mkdir,openat", "-e", "inject=mkdir:error=EROFS")
"""Makes every folder that is made fail as on a disk that is read only; needs strace, and works as root too."""


def run(*arguments, before=()):
    environment = {**os.environ, "PYTHONPATH": str(Path(ppf.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [*before, sys.executable, "-X", "importtime", "-m", "ppf", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.parametrize(
    "arguments",
    [
        "fit ref-a --study {tmp}/new", "prune {study} --ratio 0.3 --out {tmp}/out", "export ref-a --gguf {tmp}/f.gguf",
        "demo --out {tmp}/d",
    ],
)  # fmt: skip
def test_a_read_only_place_is_refused_before_a_model_is_loaded(fitted, tmp_path, arguments):
    before = sorted(tmp_path.rglob("*"))
    trace = tmp_path.parent / f"{tmp_path.name}.trace"
    words = arguments.format(tmp=tmp_path, study=fitted.folder).split()
    done = run(*words, before=(*READ_ONLY, "-o", str(trace)))
    assert done.returncode == 5 and "Read-only file system" in done.stderr.splitlines()[-1]
    assert not {"torch", "transformers"} & {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert sorted(tmp_path.rglob("*")) == before  # and nothing is made elsewhere:
    assert not [line for line in trace.read_text().splitlines() if "mkdir(" in line and "EROFS" not in line]


def test_a_place_that_cannot_be_looked_at_is_told_from_one_without_room(tmp_path):
    with refuses(ResourceError) as caught:
        check_places(FitConfig("ref-a", study=str(tmp_path / ("x" * 300))))
    assert "must lie in a folder that can be written" in str(caught.value)


def test_a_study_on_a_read_only_disk_is_read(fitted, monkeypatch, tmp_path):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
    names = sorted(path.name for path in fitted.folder.iterdir())
    assert len(measured(fitted.folder)) > 40
    assert sorted(path.name for path in fitted.folder.iterdir()) == names
