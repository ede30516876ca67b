"""Damaged files of a study: set aside, never deleted, and what can be made of the rest.

study.json        says what all else belongs to; without it the samples alone stay, and the same ppf fit begins from them
samples.sqlite    every row whose CRC holds goes into a new file
all others        are made again by the same ppf fit, from the samples
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ppf.artifact import load_artifact, remove_unfinished, sync
from ppf.errors import MEND, DamagedError, InputError, NewerError, PPFError, ResourceError
from ppf.fit_command import fit_command
from ppf.learn.agent import Agent
from ppf.learn.nested import Chain
from ppf.learn.predictor import Predictor
from ppf.lock import locked
from ppf.salvage import salvage
from ppf.samples import SampleStore, roll_back
from ppf.space.importance import Importance
from ppf.study import StudyFolder, check_version, read_sealed

_STORE, _ASIDE = "samples.sqlite", ".damaged"
_LOG, _INDEX, _JOURNAL = "-wal", "-shm", "-journal"
_BESIDE = (_LOG, _INDEX, _JOURNAL)
_LOADS: dict[str, Callable[..., object]] = {
    "importance": Importance.load, "predictor": Predictor.load, "agent": Agent.load, "nested": Chain.load,
}  # fmt: skip
_REPORT = "settings", "predictor", "heldout", "importance", "samples", "failed", "tokens", "seconds", "measuring_seconds"
_JSON: dict[str, tuple[str, ...]] = {"plans.json": (), "report.json": _REPORT}
"""And what each must hold."""
_ORPHAN = "without study.json nothing says what it belongs to"


@dataclass(frozen=True)
class Aside:
    """A damaged file.

    Attributes:
        file: Its name.
        to: What it is called now.
        why: What was wrong with it.
    """

    file: str
    to: str
    why: str

    def __str__(self) -> str:
        return f"{self.file} is damaged ({self.why}) and is called {self.to} now"


def repair(folder: Path) -> dict[str, Any]:
    """Sets the damaged files of a study aside and puts every whole sample into a store that is whole.

    Args:
        folder: The study.

    Returns:
        JSON-ready: ``"aside"``, what was damaged; ``"samples"``, how many the store holds; ``"fit"``, the command that makes the
        rest again, None if all is there or nothing says it; and ``"sure"``, whether a checksum vouches for that command.

    Raises:
        InputError: There is no study, nor the samples of one.
        InUseError: Another process writes.
        ResourceError: The folder cannot be written; what was read is still there.
        DamagedError: A study of another version; nothing is changed.
    """
    if not (folder / "study.json").exists() and not _stores(folder):
        raise InputError(f"{folder} must be a study folder; it holds neither study.json nor samples; check the name")
    with locked(folder):
        remove_unfinished(folder)
        fit, sure = fit_command(folder)
        study, why = _open(folder)
        try:
            aside = set_aside_damaged(study) if study else _set_aside_all(folder, why)
            found, samples = _mend_store(folder)
        except OSError as error:
            if isinstance(error, PPFError):
                raise
            raise ResourceError(f"{folder} must be writable; {error.strerror}; free the disk, then repair it again") from error
        is_whole = study is not None and not aside and not found
        told = {"aside": [vars(one) for one in (*aside, *found)], "samples": samples}
        return told | {"fit": None if is_whole else fit, "sure": sure}


def set_aside_damaged(study: StudyFolder) -> list[Aside]:
    """Sets aside what a fit makes again from the samples, where it is damaged or of another model."""
    aside = []
    for name, check in _checks(study):
        path = study.folder / name
        try:
            if path.exists():
                check(path)
        except NewerError:
            raise
        except DamagedError as error:
            aside.append(_set_aside(path, _reason(error)))
    return aside


def _checks(study: StudyFolder) -> Iterator[tuple[str, Callable[[Path], object]]]:
    layout = study.layout
    for name, load in _LOADS.items():
        yield study.path(name).name, partial(load, layout=layout)
    yield study.path("text").name, partial(load_artifact, kind="text", fingerprint=layout.fingerprint)
    for name, needed in _JSON.items():
        yield name, partial(_check_json, needed=needed)


def _check_json(path: Path, needed: tuple[str, ...]) -> None:
    record = read_sealed(path)
    if missing := [name for name in needed if name not in record]:
        raise DamagedError(f"{path} must hold {missing[0]!r}; it does not; {MEND}")


def _open(folder: Path) -> tuple[StudyFolder | None, str]:
    """The study, or None and what is wrong with its record.

    Raises:
        DamagedError: It is whole and of another version, which is not ours to take apart.
    """
    path = folder / "study.json"
    if not path.exists():
        return None, "study.json is missing"
    try:
        record = read_sealed(path)
    except DamagedError as error:
        return None, _reason(error)
    check_version(record, folder)
    try:
        study = StudyFolder(folder)
        _ = study.layout
    except DamagedError as error:
        return None, _reason(error)
    return study, ""


def _reason(error: Exception) -> str:
    """What came, out of what must hold, what came, and what to do."""
    return str(error).split("; ")[1]


def _set_aside_all(folder: Path, why: str) -> list[Aside]:
    """Everything but the samples: nothing says any more what it belongs to."""
    kept, whys = ("lock", _STORE), {"study.json": why}
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix in (".json", ".safetensors"))
    return [_set_aside(folder / name, whys.get(name, _ORPHAN)) for name in names if not name.startswith(kept)]


def _set_aside(path: Path, why: str) -> Aside:
    """Gives a file a name that no other has; with a store goes its log."""
    number, to = 1, path.with_name(path.name + _ASIDE)
    while any(Path(f"{to}{end}").exists() for end in ("", _LOG, _JOURNAL)):
        number += 1
        to = path.with_name(f"{path.name}{_ASIDE}{number}")
    for end in (*_BESIDE, ""):  # the log first: it must never lie beside another database
        if (part := Path(f"{path}{end}")).exists():
            os.rename(part, f"{to}{end}")
    return Aside(path.name, to.name, why)


def _stores(folder: Path) -> list[Path]:
    """All databases and logs, those set aside earlier included: a repair that was killed begins again."""
    return sorted(path for path in folder.glob(f"{_STORE}*") if not path.name.endswith((_INDEX, _JOURNAL)))


def _mend_store(folder: Path) -> tuple[list[Aside], int]:
    path = folder / _STORE
    with _workplace(folder) as work:
        undone = _undone(path, work)
        why, count = _damage(undone)
        if not why:
            if undone != path:
                sync(undone)  # SQLite has the disk hold it only where it undid something
                os.rename(undone, path)
                sync(folder)  # a log that went first would leave half a write for ever; one that stays is played once more
                os.unlink(f"{path}{_JOURNAL}")
            return [], count
        files = sorted(_stores(folder), key=lambda file: _ASIDE not in file.name)
        samples = salvage([*files, undone] if undone != path else files)
        new = work / "new"
        with closing(SampleStore(new, "", write=True)) as store:
            for sample in samples:
                store.add(sample)
        # A log alone would be played over the new one.
        is_left = any(Path(f"{path}{end}").exists() for end in ("", *_BESIDE))
        aside = [_set_aside(path, why)] if is_left else []
        os.rename(new, path)
    return aside, len(samples)


@contextmanager
def _workplace(folder: Path) -> Iterator[Path]:
    """A folder for files that are not whole yet; those of repairs that were killed go."""
    beginning = f".{_STORE}.ppf-"
    for dead in folder.glob(f"{beginning}????????"):
        shutil.rmtree(dead, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=beginning, dir=folder) as work:
        yield Path(work)


def _undone(path: Path, work: Path) -> Path:
    """The store, or a copy of it in which a write that was cut off is undone, as far as its journal is whole.

    SQLite undoes it in place and takes the journal away, whether or not all of it could be read.
    """
    if not path.exists() or not Path(f"{path}{_JOURNAL}").exists():
        return path
    for end in ("", _JOURNAL):
        shutil.copyfile(f"{path}{end}", work / f"{_STORE}{end}")
    with suppress(DamagedError):  # what it holds is read page by page then
        roll_back(work / _STORE)
    return work / _STORE


def _damage(path: Path) -> tuple[str, int]:
    """What is wrong with a store, empty if nothing is; and how many samples it holds."""
    if not path.exists():
        return "it is missing", 0
    try:
        with closing(SampleStore(path, "")) as store:
            return store.damage()
    except NewerError:
        raise
    except DamagedError as error:
        return _reason(error), 0
