"""Fitting predictors to measured samples. Training alone, in torch; what it makes answers in numpy."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import nn

from ppf.errors import InputError
from ppf.learn.features import Curves
from ppf.learn.predictor import (
    NOISE,
    Additive,
    Convolutional,
    Corrected,
    Estimator,
    Predictor,
    directions_and_sizes,
    patches,
)
from ppf.learn.threads import one_thread
from ppf.samples import Sample, kept_matrix
from ppf.space.layout import Layout
from ppf.space.mask import mask_matrices

_LINK_KNOTS = 12
_MOST_POINTS = 1500
_GP_STEPS, _GP_RATE = 120, 0.08
_GP_START = (0.3, 0.7, 1.5, 0.1, 0.05, 0.02)
_CNN_MEMBERS, _CNN_CHANNELS, _CNN_HIDDEN = 3, 8, 64
_CNN_STEPS, _CNN_BATCH, _CNN_RATE = 1200, 64, 3e-3


@one_thread()
def fit_predictor(
    kind: str, samples: Sequence[Sample], failed: Sequence[Sample], layout: Layout, dense_log_ppl: float, seed: int
) -> Predictor:
    """Fits a predictor.

    Args:
        kind: One of ``FITS``.
        samples: Finished ones; the probes among them give the single-site curves.
        failed: Those that gave no number; a failed probe counts as the worst damage seen.
        layout: Of the dense model.
        dense_log_ppl: Of the dense model on the text of the samples, nats/token.
        seed: Of the networks.

    Raises:
        InputError: A site that can shrink has no probe, or all probes failed.
    """
    curves = fit_curves(samples, failed, layout)
    rest = [sample for sample in samples if sample.purpose != "probe" or kind == "cnn"]
    kept = kept_matrix(rest, layout)
    truth = np.array([max(sample.kl, 0.0) for sample in rest])
    estimator = FITS[kind](curves, kept, truth, seed)
    link = fit_link(samples, dense_log_ppl)
    predictor = Predictor(estimator, link, np.zeros(()))
    damage, rise = (np.array([getattr(sample, name) for sample in samples]) for name in ("kl", "log_ppl"))
    expected = predictor.log_ppl_of(np.maximum(damage, 0.0))
    missed = (rise - dense_log_ppl - expected) / (expected + NOISE)
    return replace(predictor, scatter=np.sqrt((missed**2).mean()))


def fit_curves(samples: Sequence[Sample], failed: Sequence[Sample], layout: Layout) -> Curves:
    """Single-site damage curves through the probes: monotone cubic on the square root of the damage.

    Raises:
        InputError: A site that can shrink has no probe, or all probes failed.
    """
    probes = [sample for sample in [*samples, *failed] if sample.purpose == "probe"]
    if probes and all(sample.status == "failed" for sample in probes):
        raise InputError(f"some probe must give a number; all {len(probes)} failed ({probes[0].reason}); mend that and fit again")
    worst = max((sample.kl for sample in probes if sample.status == "done"), default=0.0)
    table: list[np.ndarray] = []
    for index, site in enumerate(layout.sites):
        points = {site.units: 0.0}
        for sample in probes:
            if sample.kept[index] < site.units:
                points[sample.kept[index]] = sample.kl if sample.status == "done" else worst
        if len(points) == 1 and site.floor < site.units:
            raise InputError(f"every site must have been probed; {site.label} was not; measure more samples")
        removed = site.units - np.array(sorted(points, reverse=True))
        root = np.sqrt(np.maximum.accumulate([max(points[site.units - int(gone)], 0.0) for gone in removed]))
        counts: np.ndarray = site.units - np.arange(site.units + 1)
        curve = PchipInterpolator(removed, root)(np.minimum(counts, removed[-1])) if len(points) > 1 else np.zeros(site.units + 1)
        table.append(curve.astype(np.float64) ** 2)
    return Curves(np.array(layout.units), np.concatenate(table))


def fit_link(samples: Sequence[Sample], dense_log_ppl: float) -> np.ndarray:
    """Monotone map from damage to log-perplexity above dense: medians of samples sorted by damage.

    Returns:
        Float[2, K], from (0, 0) on: damages, all different, and rises in log-perplexity that never fall.
    """
    order = sorted(samples, key=lambda sample: sample.kl)
    groups = [group for group in np.array_split(np.array([(s.kl, s.log_ppl) for s in order]), _LINK_KNOTS) if len(group)]
    knots = np.array([(0.0, dense_log_ppl), *(np.median(group, axis=0) for group in groups)]).T
    x, first = np.unique(np.maximum(knots[0], 0.0), return_index=True)
    return np.stack([x, np.maximum.accumulate(np.maximum(knots[1] - dense_log_ppl, 0.0))[first]])


def fit_additive(curves: Curves, kept: np.ndarray, truth: np.ndarray, seed: int) -> Additive:
    """Nothing is fitted but the spread of what the sum misses."""
    total = curves.damages(kept).sum(axis=1)
    missed = np.log((truth + NOISE) / (total + NOISE)) if len(kept) else np.ones(1)
    return Additive(curves.units, curves.table, np.sqrt((missed**2).mean()))


def fit_corrected(curves: Curves, kept: np.ndarray, truth: np.ndarray, seed: int) -> Estimator:
    """Gaussian process on the log-residual of the sum; hyperparameters by marginal likelihood.

    The dense model, whose damage is 0, is a sample that costs nothing. With fewer than eight others there is nothing to
    learn from, and the sum is returned as it is.
    """
    if len(kept) < 8:
        return fit_additive(curves, kept, truth, seed)
    kept = np.concatenate([curves.units[None], kept[-_MOST_POINTS:]])
    truth = np.concatenate([[0.0], truth[-_MOST_POINTS:]])
    u, t = (torch.from_numpy(part) for part in directions_and_sizes(curves.damages(kept)))
    target = torch.from_numpy(np.log(truth + NOISE)) - t
    cosine, gap = (u @ u.T) ** 2, (t[:, None] - t[None]) ** 2
    raw = torch.tensor(_GP_START, dtype=torch.float64).log().requires_grad_(True)
    mean = target.mean().clone().requires_grad_(True)
    optimiser = torch.optim.Adam([raw, mean], lr=_GP_RATE)
    for _ in range(_GP_STEPS):
        optimiser.zero_grad()
        loss = _negative_likelihood(_covariance(cosine, gap, t, raw), target - mean)
        loss.backward()
        optimiser.step()
        with torch.no_grad():
            raw.clamp_(np.log(1e-3), np.log(1e2))
    with torch.no_grad():
        factor = torch.linalg.cholesky(_covariance(cosine, gap, t, raw))
        weights = torch.cholesky_solve((target - mean)[:, None], factor)[:, 0]
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(t), dtype=torch.float64), upper=False)
    hyper: np.ndarray = np.append(raw.detach().exp().numpy(), mean.item())
    return Corrected(curves.units, curves.table, u.numpy(), t.numpy(), weights.numpy(), inverse.numpy(), hyper)


def _covariance(cosine: torch.Tensor, gap: torch.Tensor, t: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    a, angle, size, b, floor, small = raw.exp()
    shared = a**2 * torch.exp((cosine - 1) / angle**2 - gap / (2 * size**2)) + b**2 * (1 + cosine)
    return shared + torch.diag(floor**2 + (small * NOISE / t.exp()) ** 2 + 1e-6)


def _negative_likelihood(covariance: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    factor = torch.linalg.cholesky(covariance)
    solved = torch.linalg.solve_triangular(factor, target[:, None], upper=False)
    return 0.5 * (solved**2).sum() + factor.diagonal().log().sum()


def fit_cnn(curves: Curves, kept: np.ndarray, truth: np.ndarray, seed: int) -> Estimator:
    """Trains the ensemble on log(damage + e), each member on its own random batches.

    The standard deviation of its error comes from a tenth of the samples, which training does not see.
    """
    if len(kept) < 8:
        return fit_additive(curves, kept, truth, seed)
    generator = torch.Generator().manual_seed(seed)
    matrices = mask_matrices(kept, curves.units, Convolutional.WIDTH).astype(np.float32) - 0.5
    images = torch.from_numpy(patches(matrices)).view(len(kept), -1, 9)
    target = np.log(truth + NOISE)
    mean, std = target.mean(), max(target.std(), 1e-6)
    goal = torch.from_numpy((target - mean) / std).float()
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(kept)))
    unseen, seen = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    members = [_Network(images.shape[1], generator) for _ in range(_CNN_MEMBERS)]
    for member in members:
        _train(member, images[seen], goal[seen], generator)
    with torch.no_grad():
        missed = torch.stack([member(images[unseen]) for member in members]).mean(0) - goal[unseen]
    names = [name for name, _ in members[0].named_parameters()]
    arrays = {name: torch.stack([member.get_parameter(name) for member in members]).detach().numpy() for name in names}
    return Convolutional(curves.units, **arrays, scale=np.array([mean, std, std * missed.square().mean().sqrt().item()]))


class _Network(nn.Module):
    """The training twin of ``Convolutional``; parameters are named as its fields."""

    def __init__(self, places: int, generator: torch.Generator) -> None:
        super().__init__()

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator) * shape[0] ** -0.5)

        self.kernel, self.kernel_bias = normal(9, _CNN_CHANNELS), nn.Parameter(torch.zeros(_CNN_CHANNELS))
        self.hidden, self.hidden_bias = normal(places * _CNN_CHANNELS, _CNN_HIDDEN), nn.Parameter(torch.zeros(_CNN_HIDDEN))
        self.last, self.last_bias = normal(_CNN_HIDDEN), nn.Parameter(torch.zeros(()))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = (image @ self.kernel + self.kernel_bias).relu().flatten(1)
        return (hidden @ self.hidden + self.hidden_bias).relu() @ self.last + self.last_bias


def _train(network: _Network, images: torch.Tensor, goal: torch.Tensor, generator: torch.Generator) -> None:
    optimiser = torch.optim.AdamW(network.parameters(), lr=_CNN_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, _CNN_STEPS)
    for _ in range(_CNN_STEPS):
        rows = torch.randint(len(images), (min(_CNN_BATCH, len(images)),), generator=generator)
        loss = (network(images[rows]) - goal[rows]).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()


FITS: dict[str, Callable[[Curves, np.ndarray, np.ndarray, int], Estimator]] = {
    "corrected": fit_corrected,
    "additive": fit_additive,
    "cnn": fit_cnn,
}
