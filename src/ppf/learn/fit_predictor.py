"""Fitting predictors to measured samples. Training alone, in torch; what it makes answers in numpy."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.interpolate import PchipInterpolator
from torch import nn

from ppf.errors import InputError
from ppf.learn.features import Curves
from ppf.learn.fit_process import fit_process
from ppf.learn.predictor import LEAN_NOISE, Additive, Convolutional, Corrected, Estimator, Predictor, patches, read_link
from ppf.learn.process import NOISE, Points
from ppf.learn.threads import one_thread
from ppf.samples import Sample, kept_matrix
from ppf.space.layout import Layout
from ppf.space.mask import mask_matrices

_LINK_KNOTS = 12
_MOST_POINTS = 1500
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
    link = fit_link(samples, dense_log_ppl)
    damage = np.array([max(sample.kl, 0.0) for sample in rest])
    rise = np.array([sample.log_ppl for sample in rest]) - dense_log_ppl
    on_link = read_link(link, damage)
    lean = np.log((np.maximum(rise, -LEAN_NOISE / 2) + LEAN_NOISE) / (on_link + LEAN_NOISE))
    estimator = FITS[kind](Facts(curves, kept_matrix(rest, layout), damage, lean, seed))
    missed = estimator.leaning.left_out() if isinstance(estimator, Corrected) else lean if len(lean) else np.ones(1)
    return Predictor(estimator, link, np.sqrt((missed**2).mean()))


@dataclass(frozen=True, eq=False)
class Facts:
    """What an estimator is fitted to.

    Attributes:
        curves: Single-site damages.
        kept: Int[n, S] of the samples.
        damage: Float[n], measured.
        lean: Float[n], logarithm of measured log-perplexity over what the link says of the damage.
        seed: Of the networks.
    """

    curves: Curves
    kept: np.ndarray
    damage: np.ndarray
    lean: np.ndarray
    seed: int


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


def fit_additive(facts: Facts) -> Additive:
    """Nothing is fitted but the spread of what the sum misses."""
    curves = facts.curves
    total = curves.damages(facts.kept).sum(axis=1)
    missed = np.log((facts.damage + NOISE) / (total + NOISE)) if len(facts.kept) else np.ones(1)
    return Additive(curves.units, curves.table, np.sqrt((missed**2).mean()))


def fit_corrected(facts: Facts) -> Estimator:
    """Gaussian processes on the log-residuals of the sum and of the link.

    The dense model, whose damage is 0, is a sample that costs nothing. With fewer than eight others there is nothing to
    learn from, and the sum is returned as it is.
    """
    if len(facts.kept) < 8:
        return fit_additive(facts)
    curves = facts.curves
    kept = np.concatenate([curves.units[None], facts.kept[-_MOST_POINTS:]])
    damage: np.ndarray = np.append(0.0, facts.damage[-_MOST_POINTS:])
    lean: np.ndarray = np.append(0.0, facts.lean[-_MOST_POINTS:])
    points = Points.of(kept, curves)
    correction = fit_process(points, np.log(damage + NOISE) - points.sizes, places=True)
    return Corrected(curves.units, curves.table, correction, fit_process(points, lean, places=False))


def fit_cnn(facts: Facts) -> Estimator:
    """Trains the ensemble on log(damage + e), each member on its own random batches.

    The standard deviation of its error comes from a tenth of the samples, which training does not see.
    """
    curves, kept, truth, seed = facts.curves, facts.kept, facts.damage, facts.seed
    if len(kept) < 8:
        return fit_additive(facts)
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


FITS: dict[str, Callable[[Facts], Estimator]] = {
    "corrected": fit_corrected,
    "additive": fit_additive,
    "cnn": fit_cnn,
}
