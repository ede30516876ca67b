"""The study folder: where each artefact of one fitted model lies.

    study.json              model, layout, settings, dense figures      text.safetensors        token blocks
    importance.safetensors  order of the units                          samples.sqlite          what was measured
    plans.json              which masks each round wanted               predictor.safetensors   agent.safetensors
    report.json             held-out figures, times, costs              lock                    who writes; see lock.py

It has many readers and one writer.
"""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from ppf.artifact import read_json, write_json
from ppf.errors import DamagedError, InputError
from ppf.samples import SampleStore
from ppf.space.importance import Importance
from ppf.space.layout import Layout

STUDY_VERSION = 3
MEASURE_VERSION = 1
"""To be raised when the same mask would give other figures."""
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
        self.record: dict[str, Any] = read_json(self.folder / "study.json")
        if not isinstance(self.record, dict) or self.record.get("version") != STUDY_VERSION:
            raise DamagedError(f"{folder} must be a study of version {STUDY_VERSION}; it is not; fit again in a new folder")
        for field, kinds in _FIELDS.items():
            value: Any = self.record
            for name in field.split("."):
                value = value.get(name) if isinstance(value, dict) else None
            if not isinstance(value, kinds):
                raise DamagedError(f"{folder}/study.json must have {field!r}; it has not; fit again in a new folder")

    @classmethod
    def create(cls, folder: Path, record: dict[str, Any]) -> "StudyFolder":
        """Writes the record of a new study and opens it."""
        write_json(folder / "study.json", {"version": STUDY_VERSION, **record})
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

    def store(self, write: bool = False) -> SampleStore:
        """The measured samples of this study."""
        return SampleStore(self.folder / "samples.sqlite", self.context, write)

    def plan(self, name: str) -> Any | None:
        """What a stage planned earlier; None if it did not yet."""
        return self._plans().get(name)

    def keep_plan(self, name: str, plan: Any) -> None:
        """Keeps what a stage plans, so that a later start goes on with the same."""
        write_json(self.folder / "plans.json", {**self._plans(), name: plan})

    def _plans(self) -> dict[str, Any]:
        path = self.folder / "plans.json"
        plans = read_json(path) if path.is_file() else {}
        if not isinstance(plans, dict):
            raise DamagedError(f"{path} must hold plans by name; it does not; fit again in a new folder")
        return plans


def context_of(**parts: Any) -> str:
    """Hash of everything that a measurement depends on, and of how it is made."""
    parts["measure"] = MEASURE_VERSION
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]
