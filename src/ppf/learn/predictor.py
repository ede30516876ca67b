"""Predictors: the damage of an allocation without running the model. Inference alone, in numpy.

    additive      the sum of what each site does alone
    corrected     that sum times what a Gaussian process learned of the rest (process.py)
    cnn           a convolutional network on the mask matrix, as PPF has it (arXiv:2508.02381)

Damage is the KL divergence of the dense model from the pruned one on the search text; it ranks masks more sharply than
log-perplexity measured on as many tokens. A fitted monotone link gives the log-perplexity that goes with it, and a second
process how far an allocation leans off that link.
"""

from dataclasses import Field, dataclass, fields, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from ppf.artifact import load_artifact, save_artifact
from ppf.errors import MEND, DamagedError
from ppf.learn.features import Curves
from ppf.learn.process import NOISE, Points, Process
from ppf.space.layout import Layout
from ppf.space.mask import mask_matrices

LEAN_NOISE = 0.1
"""Nats/token of log-perplexity above dense below which the ratio to the link counts for little."""
_BATCH = 1024


@dataclass(frozen=True, eq=False)
class Prediction:
    """What is predicted of N allocations, nats/token.

    Attributes:
        damage: Float[N], KL divergence of the dense model from the pruned one.
        std: Float[N], its standard deviation.
        log_ppl: Float[N], log-perplexity above the dense model's.
        log_ppl_std: Float[N], its standard deviation.
    """

    damage: np.ndarray
    std: np.ndarray
    log_ppl: np.ndarray
    log_ppl_std: np.ndarray


class Estimator(Protocol):
    """What turns allocations into damages: a dataclass whose fields are arrays."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
    kind: ClassVar[str]

    def estimate(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Damage and standard deviation, Float[N] each, of Int[N, S] kept units."""
        ...

    def lean(self, kept: np.ndarray) -> np.ndarray:
        """Float[N]: logarithm of log-perplexity + e over what the link says + e."""
        ...


@dataclass(frozen=True, eq=False)
class Additive:
    """The sum of single-site damages.

    Attributes:
        units: As in ``Curves``.
        table: As in ``Curves``.
        spread: Float[], standard deviation of the logarithm of truth over sum.
    """

    kind: ClassVar[str] = "additive"
    units: np.ndarray
    table: np.ndarray
    spread: np.ndarray

    @cached_property
    def curves(self) -> Curves:
        """The curves that are summed."""
        return Curves(self.units, self.table)

    def estimate(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Estimator``."""
        damage = self.curves.damages(kept).sum(axis=1)
        return damage, (damage + NOISE) * self.spread

    def lean(self, kept: np.ndarray) -> np.ndarray:
        """See ``Estimator``."""
        return np.zeros(len(kept))


@dataclass(frozen=True, eq=False)
class Corrected:
    """The additive sum D times the exponential of a Gaussian process, which models log((truth + e) / (D + e)).

    Attributes:
        units: As in ``Curves``.
        table: As in ``Curves``.
        correction: The process.
        leaning: The process of ``lean``.
    """

    kind: ClassVar[str] = "corrected"
    units: np.ndarray
    table: np.ndarray
    correction: Process
    leaning: Process

    @cached_property
    def curves(self) -> Curves:
        """The curves that are corrected."""
        return Curves(self.units, self.table)

    def estimate(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Estimator``."""
        parts = [self._estimate(kept[start : start + _BATCH]) for start in range(0, len(kept), _BATCH)] or [(np.zeros(0),) * 2]
        return np.concatenate([damage for damage, _ in parts]), np.concatenate([std for _, std in parts])

    @property
    def seen(self) -> int:
        """Samples that it was fitted to, the dense model in front."""
        return len(self.correction.sizes)

    def first(self, count: int) -> "Corrected":
        """What it would be had it seen only the first ``count`` of them; see ``Process.first``."""
        return replace(self, correction=self.correction.first(count), leaning=self.leaning.first(count))

    def _estimate(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        points = Points.of(kept, self.curves)
        mean, std = self.correction.mean_and_std(points)
        total = np.exp(np.clip(mean, -5, 5) + points.sizes)
        return np.maximum(total - NOISE, 0.0), total * std

    def lean(self, kept: np.ndarray) -> np.ndarray:
        """See ``Estimator``."""
        return np.clip(self.leaning.mean(Points.of(kept, self.curves)), -1, 1)


@dataclass(frozen=True, eq=False)
class Convolutional:
    """An ensemble of small convolutional networks on the mask matrix; each gives log(damage + e).

    One convolution over neighbouring sites and ranks, one hidden layer over all of it, one number.

    Attributes:
        units: Int[S], units of the dense sites.
        kernel: Float[members, 9, C], 3 x 3 on one channel, stride 2 along the ranks; kernel_bias: Float[members, C].
        hidden: Float[members, S * WIDTH / 2 * C, H]; hidden_bias: Float[members, H].
        last: Float[members, H]; last_bias: Float[members].
        scale: Float[3]: mean and standard deviation of the targets, and that of the ensemble's error.
    """

    kind: ClassVar[str] = "cnn"
    WIDTH: ClassVar[int] = 8
    units: np.ndarray
    kernel: np.ndarray
    kernel_bias: np.ndarray
    hidden: np.ndarray
    hidden_bias: np.ndarray
    last: np.ndarray
    last_bias: np.ndarray
    scale: np.ndarray

    def estimate(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Estimator``."""
        answers = np.concatenate([self._members(batch) for batch in np.split(kept, range(_BATCH, len(kept), _BATCH))], axis=1)
        mean, std, error = self.scale
        total = np.exp(answers.mean(axis=0) * std + mean)
        return np.maximum(total - NOISE, 0.0), total * np.sqrt((answers * std).var(axis=0) + error**2)

    def lean(self, kept: np.ndarray) -> np.ndarray:
        """See ``Estimator``."""
        return np.zeros(len(kept))

    def _members(self, kept: np.ndarray) -> np.ndarray:
        """Float[members, N], standardised."""
        columns = patches(mask_matrices(kept, self.units, self.WIDTH).astype(np.float32) - 0.5)
        images = np.maximum(columns @ self.kernel + self.kernel_bias[:, None], 0)
        flat = images.reshape(len(self.last), len(kept), self.hidden.shape[1])
        hidden = np.maximum(flat @ self.hidden + self.hidden_bias[:, None], 0)
        return np.einsum("mnh,mh->mn", hidden, self.last) + self.last_bias[:, None]


ESTIMATORS: dict[str, type] = {cls.kind: cls for cls in (Additive, Corrected, Convolutional)}


@dataclass(frozen=True, eq=False)
class Predictor:
    """An estimator of damage and the link from damage to log-perplexity.

    Attributes:
        estimator: One of ``ESTIMATORS``.
        link: Float[2, K]: damages from 0, rising, and the log-perplexities above dense that go with them.
        scatter: Float[], standard deviation of log-perplexity around link and lean, as a share of log-perplexity + e.
    """

    estimator: Estimator
    link: np.ndarray
    scatter: np.ndarray

    @property
    def kind(self) -> str:
        """Name of the estimator."""
        return self.estimator.kind

    def predict(self, kept: np.ndarray) -> Prediction:
        """Predicts the damage of Int[N, S] kept units."""
        damage, std = self.estimator.estimate(np.asarray(kept))
        log_ppl = self.leant(np.asarray(kept), damage)
        passed_on = (self.log_ppl_of(damage + std) - self.log_ppl_of(np.maximum(damage - std, 0))) / 2
        return Prediction(damage, std, log_ppl, np.hypot(passed_on, self.scatter * (log_ppl + LEAN_NOISE)))

    def leant(self, kept: np.ndarray, damage: np.ndarray) -> np.ndarray:
        """Float[N]: log-perplexity above dense of allocations whose damage is known, nats/token."""
        return np.maximum((self.log_ppl_of(damage) + LEAN_NOISE) * np.exp(self.estimator.lean(kept)) - LEAN_NOISE, 0.0)

    def log_ppl_of(self, damage: np.ndarray) -> np.ndarray:
        """Log-perplexity above dense that usually goes with a damage, nats/token."""
        return read_link(self.link, damage)

    def save(self, path: Path, layout: Layout) -> None:
        """Writes the artefact."""
        arrays = {**_flat(self.estimator), "link": self.link, "scatter": self.scatter}
        save_artifact(path, "predictor", layout.fingerprint, arrays, estimator=self.kind)

    @classmethod
    def load(cls, path: Path, layout: Layout) -> "Predictor":
        """Reads the artefact.

        Raises:
            DamagedError: Not whole, or of another model.
        """
        arrays, header = load_artifact(path, "predictor", layout.fingerprint)
        try:
            link, scatter = arrays.pop("link"), arrays.pop("scatter")
            estimator = ESTIMATORS[header["estimator"]](**_nested(arrays))
            if any(isinstance(getattr(estimator, field.name), Process) != (field.type is Process) for field in fields(estimator)):
                raise TypeError("a process in the place of an array, or the other way round")
            return cls(estimator, link, scatter)
        except (KeyError, TypeError) as error:
            raise DamagedError(f"{path} must hold a known predictor; {error!r}; {MEND}") from error


def read_link(link: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Float[N], of Float[N] damages: straight between the knots of a link and beyond the last."""
    run, rise = np.diff(link[:, -2:])
    slope = (rise / run).sum()  # of the last piece; 0 where no sample did damage and there is none
    return np.interp(damage, link[0], link[1]) + np.maximum(damage - link[0, -1], 0) * slope


def _flat(estimator: Estimator) -> dict[str, np.ndarray]:
    """The arrays of an estimator; those of a process within it have its name and a dot in front."""
    arrays = {}
    for field in fields(estimator):
        value = getattr(estimator, field.name)
        parts = {f"{field.name}.{part.name}": getattr(value, part.name) for part in fields(value)} if is_dataclass(value) else {}
        arrays.update(parts or {field.name: value})
    return arrays


def _nested(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray | Process]:
    """The inverse."""
    whole: dict[str, np.ndarray | Process] = {name: array for name, array in arrays.items() if "." not in name}
    for prefix in sorted({name.split(".")[0] for name in arrays if "." in name}):
        whole[prefix] = Process(**{name.split(".", 1)[1]: arrays[name] for name in arrays if name.startswith(f"{prefix}.")})
    return whole


def patches(image: np.ndarray) -> np.ndarray:
    """All 3 x 3 patches of zero-padded images, every second one along the columns; Float[N, H, W] -> Float[N * H * W / 2, 9]."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, :, ::2].reshape(-1, 9)
