"""Predictors: the damage of an allocation without running the model. Inference alone, in numpy.

    additive      the sum of what each site does alone
    corrected     that sum times what a Gaussian process learned of the rest
    cnn           a convolutional network on the mask matrix, as PPF has it (arXiv:2508.02381)

Damage is the KL divergence of the dense model from the pruned one on the search text; it ranks masks more sharply than
log-perplexity measured on as many tokens. A fitted monotone link gives the log-perplexity that goes with it.
"""

from dataclasses import Field, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from ppf.artifact import load_artifact, save_artifact
from ppf.errors import DamagedError
from ppf.learn.features import Curves
from ppf.space.layout import Layout
from ppf.space.mask import mask_matrices

NOISE = 0.01
"""Nats/token below which damages count as equal: keeps logarithms of small damages quiet."""
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


@dataclass(frozen=True, eq=False)
class Corrected:
    """The additive sum D times the exponential of a Gaussian process.

    The process models log((truth + e) / (D + e)) as a function of the direction u = sqrt(d / D) in which the damage lies
    and of its size t = log(D + e). u . u' is the cosine between two allocations in the space where squared length is
    additive damage, so the kernel needs no scale per site.

    Attributes:
        units: As in ``Curves``.
        table: As in ``Curves``.
        directions: Float[n, S], u of the fitted samples.
        sizes: Float[n], t of the fitted samples.
        weights: Float[n], inverse covariance times centred targets.
        inverse: Float[n, n], inverse of the Cholesky factor of the covariance.
        hyper: Float[7]: a, l1, l2, b of the kernel, both noise terms, the mean.
    """

    kind: ClassVar[str] = "corrected"
    units: np.ndarray
    table: np.ndarray
    directions: np.ndarray
    sizes: np.ndarray
    weights: np.ndarray
    inverse: np.ndarray
    hyper: np.ndarray

    @cached_property
    def curves(self) -> Curves:
        """The curves that are corrected."""
        return Curves(self.units, self.table)

    def estimate(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Estimator``."""
        parts = [self._estimate(kept[start : start + _BATCH]) for start in range(0, len(kept), _BATCH)] or [(np.zeros(0),) * 2]
        return np.concatenate([damage for damage, _ in parts]), np.concatenate([std for _, std in parts])

    def _estimate(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        directions, sizes = directions_and_sizes(self.curves.damages(kept))
        cross = kernel(directions, sizes, self.directions, self.sizes, self.hyper)
        shrunk = self.inverse @ cross.T
        a, angle, _, b, floor, small, mean = self.hyper
        cosine = (directions**2).sum(axis=1) ** 2  # with itself; below 1 by the share of the noise
        own = a**2 * np.exp((cosine - 1) / angle**2) + b**2 * (1 + cosine)
        noise = floor**2 + (small * NOISE / np.exp(sizes)) ** 2
        std = np.sqrt(np.maximum(own - np.einsum("nm,nm->m", shrunk, shrunk), 0) + noise)
        total = np.exp(np.clip(mean + cross @ self.weights, -5, 5) + sizes)
        return np.maximum(total - NOISE, 0.0), total * std


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
        scatter: Float[], standard deviation of log-perplexity around the link, as a share of log-perplexity + e.
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
        log_ppl = self.log_ppl_of(damage)
        passed_on = (self.log_ppl_of(damage + std) - self.log_ppl_of(np.maximum(damage - std, 0))) / 2
        return Prediction(damage, std, log_ppl, np.hypot(passed_on, self.scatter * (log_ppl + NOISE)))

    def log_ppl_of(self, damage: np.ndarray) -> np.ndarray:
        """Log-perplexity above dense, nats/token, that goes with a damage; linear beyond the last knot."""
        run, rise = np.diff(self.link[:, -2:])
        slope = (rise / run).sum()  # of the last piece; 0 where no sample did damage and there is none
        return np.interp(damage, self.link[0], self.link[1]) + np.maximum(damage - self.link[0, -1], 0) * slope

    def save(self, path: Path, layout: Layout) -> None:
        """Writes the artefact."""
        arrays = {field.name: getattr(self.estimator, field.name) for field in fields(self.estimator)}
        save_artifact(
            path, "predictor", layout.fingerprint, {**arrays, "link": self.link, "scatter": self.scatter}, estimator=self.kind
        )

    @classmethod
    def load(cls, path: Path, layout: Layout) -> "Predictor":
        """Reads the artefact.

        Raises:
            DamagedError: Not whole, or of another model.
        """
        arrays, header = load_artifact(path, "predictor", layout.fingerprint)
        try:
            link, scatter = arrays.pop("link"), arrays.pop("scatter")
            return cls(ESTIMATORS[header["estimator"]](**arrays), link, scatter)
        except (KeyError, TypeError) as error:
            raise DamagedError(f"{path} must hold a known predictor; {error!r}; fit the study again") from error


def directions_and_sizes(damages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """u and t of ``Corrected``: Float[N, S] and Float[N], of Float[N, S] single-site damages."""
    total = damages.sum(axis=1) + NOISE
    return np.sqrt(damages / total[:, None]), np.log(total)


def kernel(u: np.ndarray, t: np.ndarray, v: np.ndarray, w: np.ndarray, hyper: np.ndarray) -> np.ndarray:
    """Covariance of the correction between (u Float[N, S], t Float[N]) and (v Float[M, S], w Float[M]); Float[N, M]."""
    a, angle, size, b = hyper[:4]
    cosine = (u @ v.T) ** 2
    gap = (t[:, None] - w[None]) ** 2
    return a**2 * np.exp((cosine - 1) / angle**2 - gap / (2 * size**2)) + b**2 * (1 + cosine)


def patches(image: np.ndarray) -> np.ndarray:
    """All 3 x 3 patches of zero-padded images, every second one along the columns; Float[N, H, W] -> Float[N * H * W / 2, 9]."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    return np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, :, ::2].reshape(-1, 9)
