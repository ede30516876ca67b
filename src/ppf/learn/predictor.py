"""Predictors: the damage of an allocation without running the model. Inference alone, in numpy.

    additive      the sum of what each site does alone
    corrected     that sum times what a Gaussian process learned of the rest
    cnn           a convolutional network on the mask matrix, as PPF has it (arXiv:2508.02381)

Damage is the KL divergence of the dense model from the pruned one on the search text; it ranks masks more sharply than
log-perplexity measured on as many tokens. A fitted monotone link gives the log-perplexity that goes with it.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

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
    """

    damage: np.ndarray
    std: np.ndarray
    log_ppl: np.ndarray


class Estimator(Protocol):
    """What turns allocations into damages; all state is arrays."""

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
        cross = kernel(directions.astype(np.float32), sizes.astype(np.float32), self.directions, self.sizes, self.hyper)
        shrunk = self.inverse @ cross.T
        a, _, _, b, floor, small, mean = self.hyper
        own = a**2 + b**2 * (1 + (directions**2).sum(axis=1) ** 2)
        noise = floor**2 + (small * NOISE / np.exp(sizes)) ** 2
        std = np.sqrt(np.maximum(own - np.einsum("nm,nm->m", shrunk, shrunk), 0) + noise)
        total = np.exp(np.clip(mean + cross @ self.weights, -5, 5) + sizes)
        return np.maximum(total - NOISE, 0.0), total * std


@dataclass(frozen=True, eq=False)
class Convolutional:
    """An ensemble of small convolutional networks on the mask matrix; each gives log(damage + e).

    Attributes:
        units: Int[S], units of the dense sites.
        conv1, conv2, conv3: Float[members, 3, 3, C_in, C_out] kernels; the second and third halve both sides.
        bias1, bias2, bias3: Float[members, C_out].
        dense: Float[members, F], the last layer; bias: Float[members].
        scale: Float[3]: mean and standard deviation of the targets, and that of a member's error.
    """

    kind: ClassVar[str] = "cnn"
    WIDTH: ClassVar[int] = 8
    units: np.ndarray
    conv1: np.ndarray
    bias1: np.ndarray
    conv2: np.ndarray
    bias2: np.ndarray
    conv3: np.ndarray
    bias3: np.ndarray
    dense: np.ndarray
    bias: np.ndarray
    scale: np.ndarray

    def estimate(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See ``Estimator``."""
        batches = np.split(kept, range(_BATCH, len(kept), _BATCH))
        members = [np.concatenate([self._member(index, batch) for batch in batches]) for index in range(len(self.bias))]
        mean, std, error = self.scale
        answers = np.array(members) * std + mean
        total = np.exp(answers.mean(axis=0))
        return np.maximum(total - NOISE, 0.0), total * np.sqrt(answers.var(axis=0) + error**2)

    def _member(self, index: int, kept: np.ndarray) -> np.ndarray:
        image = (mask_matrices(kept, self.units, self.WIDTH)[..., None] - 0.5).astype(np.float32)
        image = _convolve(image, self.conv1[index], self.bias1[index], stride=1)
        image = _convolve(image, self.conv2[index], self.bias2[index], stride=2)
        image = _convolve(image, self.conv3[index], self.bias3[index], stride=2)
        return image.reshape(len(kept), -1) @ self.dense[index] + self.bias[index]


ESTIMATORS: dict[str, type] = {cls.kind: cls for cls in (Additive, Corrected, Convolutional)}


@dataclass(frozen=True, eq=False)
class Predictor:
    """An estimator of damage and the link from damage to log-perplexity.

    Attributes:
        estimator: One of ``ESTIMATORS``.
        link: Float[2, K]: damages, rising, and the log-perplexities above dense that go with them.
    """

    estimator: Estimator
    link: np.ndarray

    @property
    def kind(self) -> str:
        """Name of the estimator."""
        return self.estimator.kind

    def predict(self, kept: np.ndarray) -> Prediction:
        """Predicts the damage of Int[N, S] kept units."""
        damage, std = self.estimator.estimate(np.asarray(kept))
        return Prediction(damage, std, self.log_ppl_of(damage))

    def log_ppl_of(self, damage: np.ndarray) -> np.ndarray:
        """Log-perplexity above dense, nats/token, that goes with a damage; linear beyond the last knot."""
        (x0, x1), (y0, y1) = self.link[0, -2:], self.link[1, -2:]
        beyond = np.maximum(damage - x1, 0) * (y1 - y0) / max(x1 - x0, 1e-9)
        return np.interp(damage, self.link[0], self.link[1]) + beyond

    def save(self, path: Path, layout: Layout) -> None:
        """Writes the artefact."""
        arrays = {field.name: getattr(self.estimator, field.name) for field in fields(self.estimator)}
        save_artifact(path, "predictor", layout.fingerprint, {**arrays, "link": self.link}, estimator=self.kind)

    @classmethod
    def load(cls, path: Path, layout: Layout) -> "Predictor":
        """Reads the artefact.

        Raises:
            DamagedError: Not whole, or of another model.
        """
        arrays, header = load_artifact(path, "predictor", layout.fingerprint)
        try:
            link = arrays.pop("link")
            return cls(ESTIMATORS[header["estimator"]](**arrays), link)
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


def _convolve(image: np.ndarray, weight: np.ndarray, bias: np.ndarray, stride: int) -> np.ndarray:
    """3 x 3 convolution with zero padding and ReLU; Float[N, H, W, C] -> Float[N, H', W', C_out]."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::stride, ::stride]
    n, height, width, channels = windows.shape[:4]
    columns = windows.transpose(0, 1, 2, 4, 5, 3).reshape(n * height * width, 9 * channels)
    return np.maximum(columns @ weight.reshape(9 * channels, -1) + bias, 0).reshape(n, height, width, -1)
