"""Files that are written whole or not at all, and that say what they are.

One artefact is one safetensors file whose header carries a JSON record
``{kind, version, fingerprint, sha256, ...}``. A file of another kind, of another model, or with a changed byte is refused.
"""

import contextlib
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ppf.errors import MEND, DamagedError, InputError, NewerError, PPFError, ResourceError

FORMAT_VERSION = 1
MAX_HEADER = 16 * 2**20
"""Bytes that the JSON header of a safetensors file may have; more is read by nobody."""
MARKER = "ppf.json"
"""What a folder must hold so that ``force`` may replace it."""

_UNFINISHED = ".ppf-"
_AT_CWD, _EXCHANGE = -100, 2


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file so that a reader sees the old bytes or the new ones, never a part.

    Raises:
        ResourceError: The file cannot be written (disk full, read-only, a folder in the way).
    """
    path, name = Path(path), ""
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}{_UNFINISHED}", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        name = ""
        sync(path.parent)
    except OSError as error:
        raise ResourceError(f"{path} must be writable; {error.strerror}; free the disk or choose another place") from error
    finally:  # not only after an OSError: Ctrl-C must leave nothing behind either
        if name:
            with contextlib.suppress(OSError):
                os.unlink(name)


def write_json(path: Path, record: Any) -> None:
    """Writes strict JSON (no NaN) atomically."""
    write_bytes(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path, advice: str = "restore it or make it again") -> Any:
    """Reads JSON; ``advice`` says what to do where it is none.

    Raises:
        DamagedError: The file is missing or is not JSON.
        ResourceError: The file cannot be read.
    """
    with _reading(path, "hold JSON", advice):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def save_artifact(path: Path, kind: str, fingerprint: str, tensors: Mapping[str, np.ndarray], **header: Any) -> None:
    """Saves arrays with a header that says what they are.

    Args:
        path: Where to; replaced atomically.
        kind: What it is, such as ``"importance"``.
        fingerprint: Of the layout that it belongs to.
        tensors: The arrays, by name.
        **header: Further JSON values: config, seed, method.
    """
    arrays = {name: np.asarray(value, order="C") for name, value in sorted(tensors.items())}
    written = json.dumps({"kind": kind, "version": FORMAT_VERSION, "fingerprint": fingerprint, **header}, allow_nan=False)
    record = json.loads(written)  # the checksum is of what a reader will see: lists for tuples, text for keys
    write_bytes(path, save(arrays, metadata={"ppf": json.dumps({**record, "sha256": _digest(record, arrays)})}))


def load_artifact(path: Path, kind: str, fingerprint: str | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Loads what ``save_artifact`` wrote.

    Args:
        path: The file.
        kind: What it must be.
        fingerprint: The layout that it must belong to; None accepts any.

    Returns:
        The arrays by name, and the header.

    Raises:
        DamagedError: Missing, cut, altered, of another kind, version or model.
        ResourceError: The file cannot be read.
    """
    with _reading(path, "be a whole ppf artefact", MEND):
        with open(path, "rb") as start:
            if int.from_bytes(start.read(8), "little") > MAX_HEADER:
                raise ValueError("it announces a header of more than 16 MB")
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("ppf", "{}"))
            _check_partner(path, header, kind, fingerprint)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if header.get("sha256") != _digest(header, arrays):
            raise ValueError("its checksum differs")
    return arrays, header


@contextlib.contextmanager
def atomic_folder(path: Path, force: bool = False, marker: str = MARKER) -> Iterator[Path]:
    """A folder that appears under its name only when the block ended without an error.

    Args:
        path: The name that it gets at the end.
        force: Replace a folder of that name that holds ``marker``; nothing else is ever replaced.
        marker: The file that shows what an earlier call wrote.

    Yields:
        A temporary folder beside it to fill.

    Raises:
        InputError: Something of that name exists, and ``force`` is off or may not replace it.
        ResourceError: The place cannot be written.
    """
    path = Path(os.path.abspath(path))
    check_new_folder(path, force, marker)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_dead(path)
        work, handle = _workplace(path)
    except OSError as error:
        raise ResourceError(f"{path.parent} must be a writable folder; {error.strerror}; choose another place") from error
    try:
        yield work
        for file in work.rglob("*"):
            if file.is_file() and not file.is_symlink():  # what a link points to is not ours to change
                file.chmod(0o666 & ~_umask())
                sync(file)
        work.chmod(0o777 & ~_umask())
        sync(work)
        check_new_folder(path, force, marker)  # again: filling takes long, and another process may have come first
        _swap_in(work, path, force)
    except OSError as error:
        if error.errno is None:
            raise
        raise ResourceError(f"{path} must be writable; {error.strerror}; free the disk or choose another place") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(handle)


def check_room(path: Path, needed: int) -> None:
    """Refuses a disk that is too small, before anything is written.

    Args:
        path: What will be written; the folders above it need not be there yet.
        needed: Bytes.

    Raises:
        ResourceError: Fewer are free.
    """
    above = next(folder for folder in _upwards(path) if folder.exists())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise ResourceError(f"{path} must have room for {needed:,} bytes; {free:,} are free; free the disk or choose another place")


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process was writing with ``write_bytes``. The caller must be the folder's one writer."""
    for path in Path(folder).glob(f".*{_UNFINISHED}????????"):
        if path.is_file():
            path.unlink(missing_ok=True)


def check_new_folder(path: Path, force: bool = False, marker: str = MARKER) -> None:
    """Refuses a place where a folder would overwrite something.

    Args:
        path: Where it is wanted; an empty folder may be there.
        force: A folder that holds ``marker`` may be there too.
        marker: The file that shows what an earlier call wrote.

    Raises:
        InputError: A file, a link or a folder with other things in it is there.
        ResourceError: It cannot be looked at.
    """
    path = Path(path)
    if "\n" in str(path) or "\0" in str(path):
        raise InputError(f"an output folder must have a plain name; {str(path)!r} came; choose another")
    try:
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise InputError(f"{path} must be a new folder; a file or link is there; choose another name")
        names = {entry.name for entry in path.iterdir()} if path.exists() else set()
    except OSError as error:
        raise ResourceError(f"{path} must be a place for a folder; {error.strerror}; choose another place") from error
    if names and not force:
        raise InputError(f"{path} must be a new folder; it exists and is not empty; choose another name or add --force")
    if names and marker not in names:
        raise InputError(f"{path} must hold {marker} to be replaced by --force; it holds other things; choose another name")


def check_writable(place: Path) -> None:
    """Refuses a file's or folder's place at once rather than after the work, by trying; missing folders above may be made later.

    Raises:
        InputError: It lies below a file.
        ResourceError: Nothing can be written there.
    """
    try:
        above = next(folder for folder in _upwards(place) if folder.exists())
        if not above.is_dir():
            raise InputError(f"{place} must lie in a folder; {above} is a file; choose another place")
        os.rmdir(tempfile.mkdtemp(prefix=".ppf.", dir=above))
    except OSError as error:
        raise ResourceError(f"{place} must lie in a folder that can be written; {error.strerror}; choose another place") from error


def sync(path: Path) -> None:
    """Has the disk hold what was written into a file, or which names a folder has, before anything else happens."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _upwards(place: Path) -> list[Path]:
    """The folders above a place, from the nearest up; of the root itself the root."""
    whole = Path(os.path.abspath(place))
    return list(whole.parents) or [whole]


def _workplace(path: Path) -> tuple[Path, int]:
    """A folder beside another to fill, and the handle that tells others, as long as it is open, that it is in use."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}{_UNFINISHED}", dir=path.parent))
        try:
            handle = os.open(work, os.O_RDONLY)
        except FileNotFoundError:  # someone took it for a dead one already
            continue
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        if work.exists():
            return work, handle
        os.close(handle)  # someone took it for a dead one before it was locked


def _remove_dead(path: Path) -> None:
    """Removes the workplaces of processes that were killed: those that nobody holds."""
    for work in path.parent.glob(glob.escape(f".{path.name}{_UNFINISHED}") + "????????"):
        if work.is_dir() and not work.is_symlink():
            try:
                handle = os.open(work, os.O_RDONLY)
            except FileNotFoundError:  # its owner has ended meanwhile
                continue
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(work, ignore_errors=True)
            except OSError:
                pass  # it is being filled, or nobody can tell
            finally:
                os.close(handle)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one step; False where the system or the disk cannot."""
    swap = getattr(ctypes.CDLL(None), "renameat2", None)
    return swap is not None and swap(_AT_CWD, os.fsencode(one), _AT_CWD, os.fsencode(other), _EXCHANGE) == 0


def _swap_in(work: Path, path: Path, force: bool) -> None:
    if force and path.exists():
        if not _exchange(work, path):  # else the workplace holds the old one now, and goes with it
            _swap_in_two_steps(work, path)
    else:
        os.rename(work, path)  # fails on a folder that is not empty
    sync(path.parent)


def _swap_in_two_steps(work: Path, path: Path) -> None:
    """A kill between the two leaves the old folder under another name beside it."""
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
    try:
        os.rename(path, old / path.name)
        os.rename(work, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.rename(old / path.name, path)
        raise
    finally:
        if path.exists():  # else the old folder could not be put back, and this is its only copy
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _reading(path: Path, what: str, advice: str) -> Iterator[None]:
    """Turns whatever goes wrong in reading a file that must ``what`` into our errors."""
    try:
        yield
    except PPFError:
        raise
    except FileNotFoundError:
        raise DamagedError(f"{path} must exist; it does not; is this the right folder?") from None
    except OSError as error:
        raise ResourceError(f"{path} must be readable; {error.strerror}; check its permissions") from error
    except (SafetensorError, ValueError, RecursionError, TypeError, AttributeError) as error:
        # the last two are how safetensors says that numpy lacks a number type
        raise DamagedError(f"{path} must {what}; {error}; {advice}") from error


def _check_partner(path: Path, header: Any, kind: str, fingerprint: str | None) -> None:
    if not isinstance(header, dict):
        raise ValueError("its record is not a JSON object")
    version = header.get("version")
    if header.get("kind") == kind and isinstance(version, int) and version > FORMAT_VERSION:
        what = f"{path} must be of version {FORMAT_VERSION} or older"
        raise NewerError(f"{what}; it is of version {version}; use the newer ppf that made it")
    if header.get("kind") != kind or header.get("version") != FORMAT_VERSION:
        found = f"{reprlib.repr(header.get('kind'))} version {reprlib.repr(header.get('version'))}"
        raise DamagedError(f"{path} must be a {kind!r} artefact of version {FORMAT_VERSION}; it is {found}; {MEND}")
    if fingerprint is not None and header.get("fingerprint") != fingerprint:
        raise DamagedError(f"{path} must belong to this model's layout; it was made for another one; use its own study")


def _digest(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    record = {name: value for name, value in header.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(arrays[name].tobytes())
    return digest.hexdigest()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
