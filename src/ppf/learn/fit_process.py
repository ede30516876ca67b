"""Fitting a Gaussian process: hyperparameters by marginal likelihood, in torch."""

import numpy as np
import torch

from ppf.learn.process import NOISE, Points, Process, shared_walk

_STEPS, _RATE = 120, 0.08
_START = (0.3, 0.7, 1.5, 0.1, 0.2, 0.1, 0.05, 0.02)


def fit_process(points: Points, target: np.ndarray, places: bool) -> Process:
    """Fits a process.

    Args:
        points: Of the samples.
        target: Float[n].
        places: Whether which sites went counts by itself, on a length scale each; a prior keeps the scales together.
    """
    y, covariance = torch.from_numpy(target), _Covariance(points, places)
    raw = torch.tensor(_START, dtype=torch.float64).log().requires_grad_(True)
    scales = torch.zeros(points.gone.shape[1], dtype=torch.float64, requires_grad=True)
    mean = y.mean().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([raw, mean, scales], lr=_RATE)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        prior = 0.5 * (scales - scales.mean()).square().sum()
        loss = _negative_likelihood(covariance(raw, scales), y - mean) + prior
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            raw.clamp_(np.log(1e-3), np.log(1e2))
            scales.clamp_(np.log(1e-2), np.log(1e2))
    with torch.no_grad():
        factor = torch.linalg.cholesky(covariance(raw, scales))
        weights = torch.cholesky_solve((y - mean)[:, None], factor)[:, 0]
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(y), dtype=torch.float64), upper=False)
        hyper: np.ndarray = np.append(raw.exp().numpy(), mean.item())
    if not places:
        hyper[4:6] = 0.0
    return Process(
        points.directions, points.sizes, points.gone, scales.detach().exp().numpy(), hyper, weights.numpy(), inverse.numpy()
    )


class _Covariance:
    """Of the samples, as a function of the hyperparameters; what does not depend on them is computed once."""

    def __init__(self, points: Points, places: bool) -> None:
        u, self._t, self._x = (torch.from_numpy(part) for part in (points.directions, points.sizes, points.gone))
        self._squares = (u @ u.T) ** 2, (self._t[:, None] - self._t[None]) ** 2
        self._walk = torch.from_numpy(shared_walk(points.gone, points.gone)) if places else None

    def __call__(self, raw: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Float[n, n]; both arguments are logarithms."""
        a, angle, size, b, c, d, floor, small = raw.exp()
        cosine, gap = self._squares
        shared = a**2 * torch.exp((cosine - 1) / angle**2 - gap / (2 * size**2)) + b**2 * (1 + cosine)
        if self._walk is not None:
            scaled = self._x / scales.exp()
            length = (scaled**2).sum(1)
            far = length[:, None] + length[None] - 2 * scaled @ scaled.T
            shared = shared + c**2 * torch.exp(-far.clamp(min=0) / 2) + d**2 * self._walk
        return shared + torch.diag(floor**2 + (small * NOISE / self._t.exp()) ** 2 + 1e-6)


def _negative_likelihood(covariance: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    factor = torch.linalg.cholesky(covariance)
    solved = torch.linalg.solve_triangular(factor, target[:, None], upper=False)
    return 0.5 * (solved**2).sum() + factor.diagonal().log().sum()
