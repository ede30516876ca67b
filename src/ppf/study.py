"""The study folder: where each artefact of one fitted model lies.

    study.json              model, layout, settings, dense figures      text.safetensors        token blocks
    importance.safetensors  order of the units                          samples.sqlite          what was measured
    plans.json              which masks each round wanted               predictor.safetensors   agent.safetensors
    report.json             held-out figures, times, costs              lock                    who writes; see lock.py

It has many readers and one writer. report.json, which a fit takes away before it replaces the rest and writes last, tells one
fit from another.
"""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from ppf.artifact import read_json, write_json
from ppf.errors import MEND, DamagedError, InputError, PPFError
from ppf.samples import SampleStore
from ppf.space.importance import Importance
from ppf.space.layout import Layout

STUDY_VERSION = 3
MEASURE_VERSION = 1
"""To be raised when the same mask would give other figures."""
_SEALED, _SEAL = "sealed", "sha256"
_TRIES = 5
Mark = tuple[int, int, int]
T = TypeVar("T")
_FIELDS: dict[str, tuple[type, ...]] = {
    "model.name": (str,),
    "model.digest": (str,),
    "model.bytes_per_param": (int, float),
    "layout": (dict,),
    "settings": (dict,),
    "dense.search.log_ppl": (int, float),
    "dense.test.log_ppl": (int, float),
    "context": (str,),
    "seq_len": (int,),
    "dtype": (str,),
}
"""What the record must hold; a dot leads into a record within it."""


class StudyFolder:
    """One study on disk.

    Args:
        folder: An existing study.

    Raises:
        InputError: No study lies there.
        DamagedError: Its record is not whole or of another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not (self.folder / "study.json").is_file():
            raise InputError(f"{folder} must be a study folder; it holds no study.json; make one with ppf fit")
        self.record = read_sealed(self.folder / "study.json")
        check_version(self.record, self.folder)
        for field, kinds in _FIELDS.items():
            value: Any = self.record
            for name in field.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if not isinstance(value, kinds):
                raise DamagedError(f"{folder}/study.json must have {field!r}; it has not; {MEND}")

    @classmethod
    def create(cls, folder: Path, record: dict[str, Any]) -> "StudyFolder":
        """Writes the record of a new study and opens it."""
        write_sealed(folder / "study.json", {"version": STUDY_VERSION, **record})
        return cls(folder)

    @cached_property
    def layout(self) -> Layout:
        """The removable places of the dense model."""
        return Layout.from_json(self.record["layout"])

    @cached_property
    def importance(self) -> Importance:
        """The order of the units."""
        return Importance.load(self.path("importance"), self.layout)

    @property
    def context(self) -> str:
        """Hash of model, text and settings under which samples were measured."""
        return self.record["context"]

    def path(self, artefact: str) -> Path:
        """Where an artefact lies: ``text``, ``importance``, ``predictor``, ``agent`` or ``nested``."""
        return self.folder / f"{artefact}.safetensors"

    @property
    def is_fitted(self) -> bool:
        """Whether all stages are done; the report is written last."""
        return (self.folder / "report.json").is_file() and all(
            self.path(name).is_file() for name in ("importance", "predictor", "agent", "nested")
        )

    def check_fitted(self) -> None:
        """Refuses a study whose stages are not all done.

        Raises:
            InputError: It can answer nothing yet.
        """
        if not self.is_fitted:
            raise InputError(
                f"{self.folder} must be a fitted study; its fit has not ended; wait for it or go on with the same ppf fit command"
            )

    @property
    def report(self) -> dict[str, Any]:
        """What the fit reported.

        Raises:
            DamagedError: It is missing or not whole.
        """
        return read_sealed(self.folder / "report.json")

    def drop_report(self) -> None:
        """Says that not all stages are done."""
        (self.folder / "report.json").unlink(missing_ok=True)

    def keep_report(self, report: dict[str, Any]) -> None:
        """Writes the report, and so says that all stages are done."""
        write_sealed(self.folder / "report.json", report)

    def store(self, write: bool = False) -> SampleStore:
        """The measured samples of this study.

        Raises:
            DamagedError: Not whole; or it is gone, though something was measured.
        """
        path = self.folder / "samples.sqlite"
        if write and self.plan("probes") is not None and not (path.is_file() and path.stat().st_size):
            raise DamagedError(f"{path} must hold what was measured; it is gone or empty; {MEND}")
        return SampleStore(path, self.context, write)

    def plan(self, name: str) -> Any | None:
        """What a stage planned earlier; None if it did not yet."""
        return self._plans().get(name)

    def keep_plan(self, name: str, plan: Any) -> None:
        """Keeps what a stage plans, so that a later start goes on with the same."""
        write_sealed(self.folder / "plans.json", {**self._plans(), name: plan})

    def _plans(self) -> dict[str, Any]:
        path = self.folder / "plans.json"
        return read_sealed(path) if path.is_file() else {}


def mark_of(folder: Path) -> Mark | None:
    """What differs between two fits of a study; None while none is whole."""
    try:
        status = (folder / "report.json").stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_whole(folder: Path, read: Callable[[], T]) -> tuple[T, Mark]:
    """Reads a study, and begins again where a fit replaced its files meanwhile, so that all that is read is of one fit.

    Args:
        folder: Of the study.
        read: Reads it; fails where it is not fitted.

    Returns:
        What ``read`` gives, and the mark of that fit.

    Raises:
        PPFError: ``read`` failed, and no fit is to blame.
        DamagedError: The study is replaced faster than it can be read.
    """
    for _ in range(_TRIES):
        mark = mark_of(folder)
        try:
            found = read()
        except PPFError:
            if mark == mark_of(folder):
                raise
        else:
            if mark is not None and mark == mark_of(folder):
                return found, mark
    raise DamagedError(f"{folder} must stay as it is while it is read; it changes all the time; try again later")


def write_sealed(path: Path, record: dict[str, Any]) -> None:
    """Writes a JSON object with a checksum of its content."""
    write_json(path, {_SEALED: True, **record, _SEAL: _digest(record)})  # told at both ends: damage may take one of them


def read_sealed(path: Path) -> dict[str, Any]:
    """Reads what ``write_sealed`` wrote; an object without a checksum, as earlier versions wrote it, is taken as it is.

    Raises:
        DamagedError: Missing, no JSON object, or altered.
        ResourceError: It cannot be read.
    """
    record = read_json(path, MEND)
    if not isinstance(record, dict):
        raise DamagedError(f"{path} must hold a JSON object; it does not; {MEND}")
    sealed, seal = _is_sealed(record), record.pop(_SEAL, None)
    record.pop(_SEALED, None)
    if sealed and seal != _digest(record):
        raise DamagedError(f"{path} must be as it was written; its checksum differs; {MEND}")
    return record


def is_sealed(path: Path) -> bool:
    """Whether a checksum vouches for what ``read_sealed`` gives; earlier versions wrote none.

    Raises:
        DamagedError: Missing, or no JSON.
        ResourceError: It cannot be read.
    """
    return _is_sealed(read_json(path, MEND))


def check_version(record: dict[str, Any], folder: Path) -> None:
    """Refuses a study of another version.

    Raises:
        DamagedError: It is older or newer.
    """
    version = record.get("version")
    if version != STUDY_VERSION:
        newer = type(version) is int and version > STUDY_VERSION
        advice = "use the newer ppf that made it" if newer else "fit again in a new folder"
        raise DamagedError(f"{folder} must be a study of version {STUDY_VERSION}; it is of {str(version)[:20]}; {advice}")


def _is_sealed(record: dict[str, Any]) -> bool:
    return not {_SEALED, _SEAL}.isdisjoint(record)


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(json.loads(json.dumps(record)), sort_keys=True).encode()).hexdigest()


def context_of(**parts: Any) -> str:
    """Hash of everything that a measurement depends on, and of how it is made."""
    parts["measure"] = MEASURE_VERSION
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
