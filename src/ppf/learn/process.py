"""A Gaussian process over allocations, seen through the damage that their sites do alone. Inference alone, in numpy.

direction u = sqrt(d / D)    in which the damage lies: u . u' is the cosine between two allocations in the space where
                             squared length is additive damage, so that the kernel needs no scale per site
size      t = log(D + e)     of the additive damage
gone      x                  share of each site that went, on a length scale per site

k = a^2 exp((cos^2 - 1) / l1^2 - (t - t')^2 / 2 l2^2)  +  b^2 (1 + cos^2)  +  c^2 exp(-|x - x'|^2 / 2)  +  d^2 mean min(x, x')

The last term is a random walk along the units of each site: every unit has an effect of its own, which no smooth curve through
a few probes knows.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ppf.learn.features import Curves

NOISE = 0.01
"""Nats/token below which damages count as equal: keeps logarithms of small damages quiet."""
_IN_CACHE = 2**17


@dataclass(frozen=True, eq=False)
class Points:
    """Where allocations lie.

    Attributes:
        directions: Float[N, S], u.
        sizes: Float[N], t.
        gone: Float[N, S], share of the units that went, in [0, 1].
    """

    directions: np.ndarray
    sizes: np.ndarray
    gone: np.ndarray

    @classmethod
    def of(cls, kept: np.ndarray, curves: Curves) -> "Points":
        """Of Int[N, S] kept units."""
        damages = curves.damages(kept)
        total = damages.sum(axis=1) + NOISE
        return cls(np.sqrt(damages / total[:, None]), np.log(total), 1 - kept / curves.units)


@dataclass(frozen=True, eq=False)
class Process:
    """A fitted process.

    Attributes:
        directions: Float[n, S], of the fitted samples.
        sizes: Float[n], of the fitted samples.
        gone: Float[n, S], of the fitted samples.
        scales: Float[S], length scales of ``gone``.
        hyper: Float[9]: a, l1, l2, b, c, d of the kernel, both noise terms, the mean.
        weights: Float[n], inverse covariance times centred targets.
        inverse: Float[n, n], inverse of the Cholesky factor of the covariance.
    """

    directions: np.ndarray
    sizes: np.ndarray
    gone: np.ndarray
    scales: np.ndarray
    hyper: np.ndarray
    weights: np.ndarray
    inverse: np.ndarray

    def mean(self, points: Points) -> np.ndarray:
        """Float[N]: what is expected at the points."""
        return self.hyper[-1] + self._cross(points) @ self.weights

    def mean_and_std(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """Float[N] both; the standard deviation is that of a measurement, its noise included."""
        cross = self._cross(points)
        shrunk = self.inverse @ cross.T
        a, angle, _, b, c, d, floor, small, mean = self.hyper
        cosine = (points.directions**2).sum(axis=1) ** 2  # with itself; below 1 by the share of the noise
        own = a**2 * np.exp((cosine - 1) / angle**2) + b**2 * (1 + cosine) + c**2 + d**2 * points.gone.mean(axis=1)
        noise = floor**2 + (small * NOISE / np.exp(points.sizes)) ** 2
        variance = np.maximum(own - np.einsum("nm,nm->m", shrunk, shrunk), 0) + noise
        return mean + cross @ self.weights, np.sqrt(variance)

    def left_out(self) -> np.ndarray:
        """Float[n]: by how much each fitted sample lies above what the others say of it."""
        precision = (self.inverse**2).sum(axis=0)
        return self.weights / precision

    @cached_property
    def centred(self) -> np.ndarray:
        """Float[n]: targets of the fitted samples, less the mean."""
        factor = np.linalg.inv(self.inverse)
        return factor @ (factor.T @ self.weights)

    def first(self, count: int) -> "Process":
        """What it would be had it seen only the first ``count`` samples, in the order of fitting; hyperparameters stay."""
        inverse = self.inverse[:count, :count]  # the corner of a triangle's inverse is the inverse of its corner
        weights = inverse.T @ (inverse @ self.centred[:count])
        rows = {name: getattr(self, name)[:count] for name in ("directions", "sizes", "gone")}
        return replace(self, **rows, weights=weights, inverse=inverse)

    def _cross(self, points: Points) -> np.ndarray:
        """Float[N, n]: covariance of the points with the fitted samples."""
        a, angle, size, b, c, d = self.hyper[:6]
        cosine = (points.directions @ self.directions.T) ** 2
        gap = (points.sizes[:, None] - self.sizes[None]) ** 2
        covariance = a**2 * np.exp((cosine - 1) / angle**2 - gap / (2 * size**2)) + b**2 * (1 + cosine)
        if c or d:
            here, there = points.gone / self.scales, self.gone / self.scales
            far = (here**2).sum(1)[:, None] + (there**2).sum(1)[None] - 2 * here @ there.T
            covariance += c**2 * np.exp(-np.maximum(far, 0) / 2) + d**2 * shared_walk(points.gone, self.gone)
        return covariance


def shared_walk(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Float[N, M] of Float[N, S] and Float[M, S]: how far random walks away from the dense model go together."""
    rows = max(1, _IN_CACHE // second.size)
    parts = [np.minimum(first[at : at + rows, None], second).mean(axis=2) for at in range(0, len(first), rows)]
    return np.concatenate(parts) if parts else np.zeros((0, len(second)))
