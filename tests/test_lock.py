import contextlib
import fcntl
import json
import multiprocessing
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from builders import names_in, refuses
from ppf import lock
from ppf.errors import InUseError, ResourceError
from ppf.lock import Holder, locked, network_disk
from ppf.samples import SampleStore

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


@pytest.fixture
def network(tmp_path, monkeypatch):
    """The folder lies on a disk of many machines, which grants every lock to everyone."""
    mounts = tmp_path.parent / f"{tmp_path.name}.mounts"
    mounts.write_text(f"1 2 0:1 / / rw - ext4 /dev/sda rw\n3 1 0:2 / {tmp_path} rw,relatime shared:1 - nfs4 server:/home rw\n")
    monkeypatch.setattr(lock, "_MOUNTS", mounts)
    monkeypatch.setattr(fcntl, "flock", lambda *_: None)
    return tmp_path


def test_a_network_disk_is_known(network, tmp_path_factory):
    assert network_disk(network / "not" / "yet") == network_disk(network) == "nfs4"
    assert network_disk(tmp_path_factory.getbasetemp()) == ""
    lock._MOUNTS.write_text("rubbish\n1 - \n")
    assert network_disk(network) == ""


@pytest.mark.parametrize("name", ["a b", "a\tb", "a\nb", "a\\040b", "a\xa0b", "caf\udce9"])
def test_a_network_disk_of_any_name_is_known(tmp_path, monkeypatch, name):
    place = str(tmp_path / name)
    for char in "\\ \t\n":  # the backslash first: it begins what the others become
        place = place.replace(char, f"\\{ord(char):03o}")
    (tmp_path / "mounts").write_bytes(os.fsencode(f"1 2 0:1 / / rw - ext4 /dev/sda rw\n3 1 0:2 / {place} rw - nfs4 server:/ rw\n"))
    monkeypatch.setattr(lock, "_MOUNTS", tmp_path / "mounts")
    assert network_disk(tmp_path / name / "study") == "nfs4" and network_disk(tmp_path / "a") == ""


def test_on_a_network_disk_nobody_takes_over_from_another_machine(network):
    (network / "lock").write_text(json.dumps(asdict(replace(Holder.here(), host="elsewhere", pid=7))))
    with refuses(InUseError) as caught, locked(network):
        pytest.fail("two writers")
    assert "process 7 on elsewhere" in str(caught.value) and f"remove {network / 'lock'}" in str(caught.value)
    (network / "lock").write_text(json.dumps(asdict(replace(Holder.here(), started=1))))
    with locked(network) as dead:
        assert dead is not None  # of this machine it is known that it ended


def test_on_a_network_disk_he_who_wrote_last_has_it(network, monkeypatch):
    other = replace(Holder.here(), host="elsewhere")
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (network / "lock").write_text(json.dumps(asdict(other))))
    with refuses(InUseError) as caught, locked(network):
        pytest.fail("two writers")
    assert "on elsewhere" in str(caught.value)


LIED_TO = """
import fcntl, pathlib, sys
from ppf import lock
from ppf.errors import InUseError
from ppf.samples import Sample, SampleStore
fcntl.flock = lambda *_: None
folder, lock._MOUNTS, start, count = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
written = 0
sys.stdin.readline()
while written < count:
    try:
        with lock.locked(folder):
            store = SampleStore(folder / "s", "c", write=True)
            assert store._db.execute("PRAGMA journal_mode").fetchone() == ("delete",)
            for index in range(start + written, start + min(written + count // 4, count)):
                store.add(Sample("c", f"{index:032d}", "spread", 0.3, (index, 2), bytes(9), "done", "", 2.5, 0.5, 4096, 0.1))
                written += 1
            store.close()
    except InUseError:
        pass
"""


@pytest.mark.parametrize("count", [40, pytest.param(2000, marks=pytest.mark.slow)])
def test_two_whom_a_network_disk_lies_to_lose_nothing(network, count):
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.lock"].__file__).parents[1])}
    words = [sys.executable, "-c", LIED_TO, str(network), str(lock._MOUNTS)]
    with contextlib.ExitStack() as stack:
        pipes = {"stdin": subprocess.PIPE, "text": True, "env": environment}
        opening = (subprocess.Popen([*words, str(lane * 10**6), str(count)], **pipes) for lane in (0, 1))
        writers = [stack.enter_context(process) for process in opening]
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
    assert [writer.returncode for writer in writers] == [0, 0]
    with contextlib.closing(SampleStore(network / "s", "c")) as store:
        assert len(store.all()) == 2 * count and store.damaged == 0


@pytest.mark.parametrize("change", [{"started": 1}, {"pid": 2**22 + 1}, {"host": "elsewhere"}])
def test_a_number_that_another_process_has_now_is_no_holder(tmp_path, change):
    (tmp_path / "lock").write_text(json.dumps(asdict(replace(Holder.here(), **change))))
    with locked(tmp_path) as dead:
        assert dead == replace(Holder.here(), since=dead.since, **change)


@pytest.fixture(params=[0, 9])
def full(request):
    """No file may grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (request.param, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_no_reason_not_to_lock(tmp_path, full):
    for _ in range(2):
        with locked(tmp_path) as dead, refuses(InUseError), locked(tmp_path):
            pytest.fail("two writers")
        assert dead is None and (tmp_path / "lock").stat().st_size == 0


def test_a_full_network_disk_is_said_and_not_another_writer(network, full):
    with refuses(ResourceError) as caught, locked(network):
        pytest.fail("a lock that nobody sees")
    assert f"{network} must take a lock file" in str(caught.value)


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
