"""Statistics: what the published heuristics read of a model, as plain numbers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ppf.artifact import load_artifact, save_artifact
from ppf.errors import MEND, DamagedError, InputError
from ppf.space.importance import check_units
from ppf.space.layout import Layout

_PER_SITE = ("outliers", "alpha", "influence", "spread")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Numbers of a dense model from which a policy can be computed without running it.

    Attributes:
        outliers: Float[S], OWL's share of outliers in the layer of each site, in [0, 1]; the sites of a layer share it.
        alpha: Float[S], AlphaPruning's power-law exponent of the layer of each site; the sites of a layer share it.
        influence: Float[S], ShortGPT's block influence of each sub-layer alone, in [0, 2].
        spread: Float[S], standard deviation of FLAP's score over the reader's columns of each site.
        variance: Per site Float[U], FLAP's score (WIFV) of each unit: the sum over its columns.
    """

    outliers: np.ndarray
    alpha: np.ndarray
    influence: np.ndarray
    spread: np.ndarray
    variance: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        variance = tuple(np.array(site, dtype=np.float32) for site in self.variance)
        vectors = {name: np.array(getattr(self, name), dtype=np.float64) for name in _PER_SITE}
        for name, values in [*vectors.items(), *(("variance", site) for site in variance)]:
            if values.ndim != 1 or not np.isfinite(values).all():
                raise InputError(f"statistics must be finite, one number a site or unit; {name} is not; mend it")
            values.flags.writeable = False
        for name, values in vectors.items():
            if len(values) != len(variance):
                raise InputError(f"statistics must be of the same {len(variance)} sites; {name} has {len(values)}; mend it")
            object.__setattr__(self, name, values)
        object.__setattr__(self, "variance", variance)

    def save(self, path: Path, layout: Layout) -> None:
        """Writes the artefact."""
        tensors = {name: getattr(self, name) for name in _PER_SITE}
        tensors |= {f"variance.{index:04d}": site for index, site in enumerate(self.variance)}
        save_artifact(path, "statistics", layout.fingerprint, tensors)

    @classmethod
    def load(cls, path: Path, layout: Layout) -> "Statistics":
        """Reads the artefact.

        Raises:
            DamagedError: Not whole, or of another model.
        """
        arrays, _ = load_artifact(path, "statistics", layout.fingerprint)
        vectors = {name: arrays.pop(name, np.zeros(0)) for name in _PER_SITE}
        variance = tuple(arrays[name] for name in sorted(arrays))
        check_units(variance, layout.units, str(path))
        for name, values in vectors.items():
            if values.shape != (len(layout.sites),):
                raise DamagedError(f"{path} must have a number per site for {name}; it has shape {values.shape}; {MEND}")
        return cls(**vectors, variance=variance)
