import json
import os
import re
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from stores_made import opened

WRITER = """
import sys
from ppf.samples import Sample, SampleStore
store = SampleStore(sys.argv[1], "c", write=True)
for index in range(int(sys.argv[2]), 10**9):
    digest = f"{index:032d}"
    store.add(Sample("c", digest, "spread", 0.3, (index, 2), bytes(9), "done", "", 2.5, index / 7, 4096, 0.1))
    print(digest, flush=True)
"""


@pytest.mark.parametrize("count", [150, pytest.param(5000, marks=pytest.mark.slow)])
def test_two_writers_at_once_lose_nothing_and_refuse_nothing(tmp_path, count):
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.samples"].__file__).parents[1])}
    commands = [[sys.executable, "-c", WRITER, str(tmp_path / "s"), str(start)] for start in (0, 10**6)]
    done = []
    with ExitStack() as stack:
        opening = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for command in commands)
        writers = [stack.enter_context(process) for process in opening]
        for writer in writers:
            stack.callback(writer.kill)
        for writer in writers:
            done += [writer.stdout.readline() for _ in range(count)]
        for writer in writers:
            writer.kill()
            done += writer.stdout.readlines()
    done = [line.strip() for line in done if line.endswith("\n")]
    with opened(tmp_path / "s") as store:
        found = [one.digest for one in store.all()]
    assert {line[-7] for line in done} == {"0", "1"} and len(done) >= 2 * count
    assert store.damaged == 0 and len(found) == len(set(found)) <= len(done) + 2 and set(done) <= set(found)


def test_two_who_make_a_store_at_once_both_write(tmp_path):
    code = "import killing, pathlib, sys; at = pathlib.Path(sys.argv[1])\n"
    code += "print([killing.kill_twice(at / str(index), index, 0.05)[1] for index in range(60)])"
    source, tests = Path(sys.modules["ppf.samples"].__file__).parents[1], Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tests}"}
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and json.loads(done.stdout) == [2] * 60, done


def test_a_hundred_kills_of_two_writers_lose_nothing_that_was_acknowledged(tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "killing.py"), str(tmp_path / "s"), "100"]
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.samples"].__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] == 200 and found["acknowledged"] > 200
    assert (found["lost"], found["twice"], found["damaged"], found["integrity"]) == (0, 0, 0, "ok")
    assert found["stored"] <= found["acknowledged"] + found["killed"]  # at most one each that was written and not yet told


def test_a_full_disk_loses_nothing_and_the_store_goes_on_when_there_is_room(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.samples"].__file__).parents[1])}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
    done = []
    for code in (limit + WRITER, limit + WRITER, WRITER):
        command = [sys.executable, "-c", code, str(tmp_path / "s"), str(len(done))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as writer:
            lines = writer.stdout.readlines() if code != WRITER else [writer.stdout.readline() for _ in range(9)]
            writer.kill()
            errors = writer.stderr.read()
        done += [line.strip() for line in lines]
        if code != WRITER:
            assert "ResourceError" in errors and len(done) > 50
            with opened(tmp_path / "s") as store:
                assert [one.digest for one in store.all()] == done and store.damaged == 0
    assert len(set(done)) == len(done)


def test_killing_the_writer_loses_nothing_that_it_acknowledged(tmp_path):
    path, done = tmp_path / "s", []
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.samples"].__file__).parents[1])}
    for count in (1, 7, 40):
        command = [sys.executable, "-c", WRITER, str(path), str(len(done))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
            lines = [writer.stdout.readline() for _ in range(count)]
            os.kill(writer.pid, signal.SIGKILL)
            lines += writer.stdout.readlines()
        assert writer.returncode == -signal.SIGKILL
        done += [line.strip() for line in lines if line.endswith("\n")]
        with opened(path) as store:
            found = {one.digest for one in store.all()}
            assert store.damaged == 0 and found >= set(done) and len(found) <= len(done) + 1
        done = sorted(found)
    assert len(done) >= 48


TEN = WRITER.replace("10**9", "int(sys.argv[2]) + 10")
CALLS = ("openat", "write", "pwrite64", "ftruncate", "fdatasync", "fsync", "unlink", "fallocate")


@pytest.mark.slow
def test_a_kill_at_any_call_in_making_a_store_and_writing_into_it_loses_nothing(tmp_path):
    """Needs strace."""
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.samples"].__file__).parents[1])}

    def run(folder, *options):
        folder.mkdir(exist_ok=True)
        trace = ["strace", "-f", "-qq", "-y", "-P", str(folder / "s"), "-P", f"{folder / 's'}-wal", "-P", f"{folder / 's'}-shm"]
        command = [*trace, "-o", str(folder / "trace"), *options, sys.executable, "-c", TEN, str(folder / "s"), "0"]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    dry = run(tmp_path / "dry", "-e", "trace=" + ",".join(CALLS))
    made = re.findall(r"^\d+ +(\w+)\(", (tmp_path / "dry" / "trace").read_text(), re.MULTILINE)
    assert len(dry.stdout.split()) == 10 and made.count("pwrite64") > 20 and {"fdatasync", "fsync"} & set(made)
    for call in sorted(set(made)):
        for number in range(1, made.count(call) + 1):
            folder = tmp_path / f"{call} {number}"
            told = run(folder, "-e", f"inject={call}:signal=KILL:when={number}").stdout.split()
            assert len(told) < 11, (call, number)
            with opened(folder / "s", write=True) as store:
                found = [one.digest for one in store.all()]
                assert found[: len(told)] == told and len(found) <= len(told) + 1 and store.damaged == 0, (call, number)
