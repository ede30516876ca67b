"""Importance: a score per unit, and so the order in which units go inside each site."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ppf.artifact import load_artifact, save_artifact
from ppf.errors import DamagedError, InputError
from ppf.space.layout import Layout


@dataclass(frozen=True, eq=False)
class Importance:
    """How much each unit matters, comparable inside one site.

    Attributes:
        scores: Per site Float[U]; higher stays longer.
        method: Name of the criterion, such as ``"taylor"``.
        source: Which text it was calibrated on.
    """

    scores: tuple[np.ndarray, ...]
    method: str
    source: str

    def __post_init__(self) -> None:
        scores = tuple(np.array(score, dtype=np.float32) for score in self.scores)
        for score in scores:
            if score.ndim != 1 or not np.isfinite(score).all():
                raise InputError(f"importance must be finite, one number a unit; {self.method} gave others; try another score")
            score.flags.writeable = False
        object.__setattr__(self, "scores", scores)

    @cached_property
    def order(self) -> tuple[np.ndarray, ...]:
        """Per site Int[U]: units from the most to the least important; ties in index order."""
        order = tuple(np.argsort(-score, kind="stable") for score in self.scores)
        for units in order:
            units.flags.writeable = False
        return order

    def save(self, path: Path, layout: Layout) -> None:
        """Writes the artefact."""
        tensors = {f"{index:04d}": score for index, score in enumerate(self.scores)}
        save_artifact(path, "importance", layout.fingerprint, tensors, method=self.method, source=self.source)

    @classmethod
    def load(cls, path: Path, layout: Layout) -> "Importance":
        """Reads the artefact.

        Raises:
            DamagedError: Not whole, or of another model.
        """
        arrays, header = load_artifact(path, "importance", layout.fingerprint)
        scores = tuple(arrays[name] for name in sorted(arrays))
        check_units(scores, layout.units, str(path))
        return cls(scores, header["method"], header["source"])


def check_units(sites: Sequence[np.ndarray], units: Sequence[int] | np.ndarray, what: str) -> None:
    """Refuses per-site arrays whose lengths are not the units of the model.

    Raises:
        DamagedError: Another number of sites or units.
    """
    if [len(site) for site in sites] != [int(count) for count in units]:
        raise DamagedError(f"{what} must have the {len(units)} sites of this model; it has others; use its own study")
