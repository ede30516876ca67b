import fcntl
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from builders import names_in, refuses
from ppf.errors import InUseError, ResourceError
from ppf.lock import Holder, locked

HOLDER = """
import subprocess, sys, time
from pathlib import Path
from ppf.lock import locked
with locked(Path(sys.argv[1])):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
    time.sleep(30)
"""


def test_the_folder_is_made_and_the_lock_given_back(tmp_path):
    for _ in range(2):
        with locked(tmp_path / "a" / "b"):
            assert names_in(tmp_path / "a" / "b") == ["lock"]
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_a_second_writer_of_this_process_is_refused(tmp_path):
    with locked(tmp_path), refuses(InUseError), locked(tmp_path):
        pytest.fail("two writers")
    with locked(tmp_path):
        pass


def test_a_place_that_is_no_folder_is_said(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "study"):
        with refuses(ResourceError), locked(path):
            pytest.fail("locked a file")


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_another_process_holds_the_lock_until_it_dies(tmp_path, end):
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.lock"].__file__).parents[1])}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as holder:
        child = int(holder.stdout.readline())
        with refuses(InUseError) as caught, locked(tmp_path):
            pytest.fail("two writers")
        assert f"process {holder.pid} on {socket.gethostname()}" in str(caught.value)
        assert time.strftime("since %Y-%m-%d ") in str(caught.value)
        holder.send_signal(end)
        holder.wait()
        try:
            start = time.monotonic()
            with locked(tmp_path) as dead:  # though a process that the holder started lives on
                assert time.monotonic() - start < 1
                assert Path(f"/proc/{child}").exists() and dead.pid == holder.pid and not dead.is_alive
            with locked(tmp_path) as dead:
                assert dead is None
        finally:
            os.kill(child, signal.SIGKILL)


def count_up(folder, times):
    """Adds to a number in a file, each time alone."""
    for _ in range(times):
        while True:
            try:
                with locked(folder):
                    value = int((folder / "number").read_text())
                    time.sleep(0.001)
                    (folder / "number").write_text(str(value + 1))
                    break
            except InUseError:
                time.sleep(0.001)


def test_writers_exclude_each_other(tmp_path):
    (tmp_path / "number").write_text("0")
    spawned = multiprocessing.get_context("spawn")
    writers = [spawned.Process(target=count_up, args=(tmp_path, 20)) for _ in range(2)]
    for writer in writers:
        writer.start()
    count_up(tmp_path, 20)
    for writer in writers:
        writer.join()
    assert (tmp_path / "number").read_text() == "60" and [writer.exitcode for writer in writers] == [0, 0]


@pytest.mark.parametrize("text", ["", "{", "5", "[]", '{"pid": 1}', '{"pid": null, "host": 1}', "\udcff"])
def test_a_record_that_cannot_be_read_is_nobody_s(tmp_path, text):
    (tmp_path / "lock").write_text(text, errors="surrogateescape")
    with locked(tmp_path) as dead:
        assert dead is None
        (tmp_path / "lock").write_text(text, errors="surrogateescape")
        with refuses(InUseError) as caught, locked(tmp_path):
            pytest.fail("two writers")
        assert "another process" in str(caught.value)


def test_a_disk_that_grants_every_lock_lets_no_second_writer_of_this_machine_in(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    with locked(tmp_path), refuses(InUseError) as caught, locked(tmp_path):
        pytest.fail("two writers")
    assert str(os.getpid()) in str(caught.value)
    with locked(tmp_path) as dead:
        assert dead is None


@pytest.mark.parametrize("change", [{"started": 1}, {"pid": 2**22 + 1}, {"host": "elsewhere"}])
def test_a_number_that_another_process_has_now_is_no_holder(tmp_path, change):
    (tmp_path / "lock").write_text(json.dumps(asdict(replace(Holder.here(), **change))))
    with locked(tmp_path) as dead:
        assert dead == replace(Holder.here(), since=dead.since, **change)


def test_a_full_disk_is_no_reason_not_to_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(json, "dumps", lambda *_: "")  # nothing gets onto it
    with locked(tmp_path), refuses(InUseError), locked(tmp_path):
        pytest.fail("two writers")


def test_a_lock_file_that_its_holder_removed_is_not_what_is_locked(tmp_path, monkeypatch):
    """Else one process would hold the removed file and another one a new one."""
    flock, removed = fcntl.flock, []

    def remove_first(handle, operation):
        if not removed:
            (tmp_path / "lock").unlink()
            removed.append(True)
        return flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with locked(tmp_path), refuses(InUseError), locked(tmp_path):
        pass
    assert removed
