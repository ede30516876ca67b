"""One writer a folder. The lock dies with the process that holds it, and the file of the lock says who that is.

Some network disks grant every lock to everyone. There the file alone decides, and nobody takes over from another machine.
"""

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path

from ppf.errors import InUseError, ResourceError

_MOUNTS = Path("/proc/self/mountinfo")
_NETWORK = {
    "nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs", "ceph", "glusterfs", "afs", "fuse.sshfs", "fuse.glusterfs",
    "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse",
}  # fmt: skip
_ESCAPED = re.compile(r"\\([0-7]{3})")
"""How the kernel writes a space, a tab, a line break or a backslash in a name."""
_SETTLING = 0.2
"""Seconds in which another, who read the file as empty too, has written into it."""


@dataclass(frozen=True)
class Holder:
    """A process that writes.

    Attributes:
        pid: Its number.
        host: The machine that it runs on.
        since: When it began to write.
        started: When the process started, in the kernel's ticks since boot, so that another one of the same number is not
            taken for it; 0 where the system does not say.
    """

    pid: int
    host: str
    since: str
    started: int

    @classmethod
    def here(cls) -> "Holder":
        """This process."""
        return cls(os.getpid(), socket.gethostname(), time.strftime("%Y-%m-%d %H:%M:%S %z"), _started(os.getpid()))

    @property
    def is_alive(self) -> bool:
        """Whether it certainly still runs; a process of another machine may or may not."""
        return self.host == socket.gethostname() and self.started > 0 and _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[Holder | None]:
    """Makes this process the folder's one writer.

    Args:
        folder: Made if it is not there.

    Yields:
        The holder that died before it could give the lock back; None if the last one ended well.

    Raises:
        InUseError: Another process holds it.
        ResourceError: The folder cannot be made, or on a network disk the file cannot be written.
    """
    with _held(folder) as handle:
        before, ours = _read(handle), Holder.here()
        is_shared = bool(network_disk(folder))
        if before is not None and (before.is_alive or (is_shared and before.host != ours.host)):
            raise _in_use(folder, before)
        reason = _write(handle, json.dumps(asdict(ours)))
        if is_shared:
            if reason:  # there the file is all that keeps others out
                raise ResourceError(f"{folder} must take a lock file; {reason}; free the disk or choose another place")
            time.sleep(_SETTLING)
            if (now := _read(handle)) != ours:
                raise _in_use(folder, now)
        try:
            yield before
        finally:
            _write(handle, "")


def network_disk(folder: Path) -> str:
    """The kind of network disk on which a folder lies; empty for a disk of this machine, and where the system does not say."""
    place, kinds = Path(os.path.realpath(folder)), {"": ""}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in _MOUNTS.read_bytes().splitlines():
            at, _, kind = os.fsdecode(line).partition(" - ")
            mounted = _ESCAPED.sub(lambda found: chr(int(found[1], 8)), at.split(" ")[4])
            if place.is_relative_to(mounted):
                kinds[mounted] = kind.split()[0]
    kind = kinds[max(kinds, key=len)]
    return kind if kind in _NETWORK else ""


def _held(folder: Path) -> FileIO:
    """The folder's lock file, locked. It has no buffer: what a full disk did not take would fail again when it is closed."""
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = open(folder / "lock", "ab+", buffering=0)  # noqa: SIM115 (closed by the caller)
        except OSError as error:
            raise ResourceError(f"{folder} must be a writable folder; {error.strerror}; choose another place") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            with handle:
                raise _in_use(folder, _read(handle)) from error
        try:
            if os.fstat(handle.fileno()).st_ino == os.stat(folder / "lock").st_ino:
                return handle
        except FileNotFoundError:
            pass
        handle.close()  # whoever held it before has removed the file, and others would lock a new one


def _in_use(folder: Path, holder: Holder | None) -> InUseError:
    who = f"{holder} writes since {holder.since}" if holder else "another process writes"
    todo = "wait for it or choose another folder"
    if holder and holder.host != socket.gethostname():
        todo += f", or remove {folder / 'lock'} if that process has ended"
    return InUseError(f"{folder} must have one writer; {who}; {todo}")


def _read(handle: FileIO) -> Holder | None:
    """Who the file says; None if it says nobody, or nothing that can be read."""
    try:
        handle.seek(0)
        record = json.loads(handle.read(4096))
        return Holder(int(record["pid"]), str(record["host"]), str(record["since"]), int(record["started"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(handle: FileIO, record: str) -> str:
    """Why a record could not be written, empty if it was. Where locks hold, a full disk is no reason to stop."""
    data = record.encode()
    try:
        handle.seek(0)
        handle.truncate()
        written = handle.write(data)
        os.fsync(handle.fileno())  # only now a network disk says whether there was room, and shows others what was written
    except OSError as error:
        return error.strerror or str(error)
    return "" if written == len(data) else os.strerror(errno.ENOSPC)


def _started(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError, ValueError):
        return 0
