"""Policies that need no search: the additive optimum, which is also the prior that the agent starts from, and the heuristics."""

from collections.abc import Callable, Sequence

import numpy as np

from ppf.learn.features import Curves
from ppf.space.budget import removed
from ppf.space.importance import Importance, check_units
from ppf.space.layout import Layout
from ppf.space.policy import Policy
from ppf.space.statistics import Statistics

Heuristic = Callable[[Statistics, Importance, Layout, float], Policy]
OWL_LAMBDA = 0.08
ALPHA_EPSILON = 0.3
KNAPSACK_BINS = 1000
_FINER = 10
_LEVELS = 48


def knapsack(curves: Curves, layout: Layout, bins: int = KNAPSACK_BINS) -> np.ndarray:
    """For every budget the kept units with the least sum of single-site damages.

    Exact over at most 48 counts a site and budgets in ``10 * bins`` equal steps, into which what a site frees is rounded
    down: a hundred sites of a large model lose one step in a thousand together.

    Args:
        curves: Single-site damages.
        layout: Of the dense model.
        bins: Steps of the budget that are returned.

    Returns:
        Float[bins + 1, S], row b: wished keep-ratio when at least the share b / bins of the prunable parameters goes.
        Rows beyond what the floors allow repeat the last that they do.
    """
    steps = bins * _FINER
    best = np.full(steps + 1, np.inf)
    best[0] = 0.0
    budgets, choice = np.arange(steps + 1), []
    for index, site in enumerate(layout.sites):
        counts = np.unique(np.linspace(site.floor, site.units, min(_LEVELS, site.units - site.floor + 1)).round().astype(int))[::-1]
        damage, freed = curves.site(index)[counts], _freed(counts, index, layout, steps)
        total = best + damage[0]
        pick: np.ndarray = np.zeros(steps + 1, dtype=np.int64)
        for place in range(1, len(counts)):
            other = best[np.maximum(budgets - freed[place], 0)] + damage[place]
            better = other < total
            total[better], pick[better] = other[better], place
        best = total
        choice.append(counts[pick])
    rows, left = np.zeros((bins + 1, len(layout.sites))), budgets[::_FINER]
    for index in reversed(range(len(layout.sites))):
        kept = choice[index][left]
        rows[:, index] = kept / layout.units[index]
        left = np.maximum(left - _freed(kept, index, layout, steps), 0)
    last = int(np.flatnonzero(np.isfinite(best[::_FINER]))[-1])
    rows[last:] = rows[last]
    return rows


def _freed(counts: np.ndarray, index: int, layout: Layout, steps: int) -> np.ndarray:
    """Budget steps that go when ``counts`` units of a site stay."""
    share = (layout.units[index] - counts) * layout.costs[index] / layout.prunable
    return np.floor(share * steps + 1e-9).astype(np.int64)


def uniform(statistics: Statistics, importance: Importance, layout: Layout, ratio: float) -> Policy:
    """The same ratio at every site."""
    return Policy.uniform(layout)


def owl(statistics: Statistics, importance: Importance, layout: Layout, ratio: float) -> Policy:
    """A layer with more outliers keeps more; between the layers with most and least lie ``2 * OWL_LAMBDA``.

    Reference: arXiv:2310.05175, section 3 (differs: the mean over parameters, not over layers, meets the budget).
    """
    return Policy(2 * OWL_LAMBDA * _unit_range(statistics.outliers))


def alpha_pruning(statistics: Statistics, importance: Importance, layout: Layout, ratio: float) -> Policy:
    """A layer with a larger exponent (a lighter tail, less well trained) loses more: 1 -/+ ``ALPHA_EPSILON`` times the ratio.

    Reference: arXiv:2410.10912, section 3.
    """
    lost = 1 - ALPHA_EPSILON + 2 * ALPHA_EPSILON * _unit_range(statistics.alpha)
    return Policy(1 - ratio * lost / np.average(lost, weights=layout.units * layout.costs))


def flap(statistics: Statistics, importance: Importance, layout: Layout, ratio: float) -> Policy:
    """One threshold for all sites on the fluctuation of the units, standardised inside each site.

    A unit's score is the mean of its columns' standard scores, so that the score of a head is that of an average channel.

    Reference: arXiv:2312.11983, section 3 (WIFV, adaptive structure; differs: KV groups in place of heads, no bias compensation).
    """
    check_units(statistics.variance, layout.units, "the statistics")
    columns = [site.columns for site in layout.sites]
    sites = zip(statistics.variance, columns, statistics.spread, strict=True)
    return _above_threshold([_standard(scores / width, spread) for scores, width, spread in sites], layout, ratio)


def global_ranking(statistics: Statistics, importance: Importance, layout: Layout, ratio: float) -> Policy:
    """``flap`` on any importance: one threshold for all sites on its scores, standardised over the units of each site."""
    check_units(importance.scores, layout.units, "importance")
    standard = [_standard(scores, float(np.std(scores, dtype=np.float64))) for scores in importance.scores]
    return _above_threshold(standard, layout, ratio)


def depth(statistics: Statistics, importance: Importance, layout: Layout, ratio: float) -> Policy:
    """Whole sub-layers go, those of least influence first, the last one in part.

    Reference: arXiv:2403.03853, section 3 (differs: sub-layers in place of layers; each keeps its floor).
    """
    ranks = np.unique(statistics.influence, return_inverse=True)[1]
    return Policy(ranks.astype(np.float64))  # a gap of 1: a site is full before the one below it leaves its floor


HEURISTICS: dict[str, Heuristic] = {
    "uniform": uniform,
    "owl": owl,
    "alpha_pruning": alpha_pruning,
    "flap": flap,
    "global_ranking": global_ranking,
    "depth": depth,
}
"""By name; each reads what it needs of the statistics or the importance, and the ratio is that of the prunable parameters."""


def _unit_range(values: np.ndarray) -> np.ndarray:
    """Float[S] in [0, 1]: linear from the least to the largest; 1/2 everywhere if they are equal."""
    width = float(np.ptp(values))
    return (values - values.min()) / width if width > 0 else np.full(len(values), 0.5)


def _standard(scores: np.ndarray, spread: float) -> np.ndarray:
    """Float[U]: distance from the mean in spreads; 0 everywhere if the scores differ by no more than rounding."""
    mean = scores.mean(dtype=np.float64)
    away = scores - mean
    return away / spread if spread > 0 and np.abs(away).max() > 1e-6 * abs(mean) else np.zeros(len(scores))


def _above_threshold(scores: Sequence[np.ndarray], layout: Layout, ratio: float) -> Policy:
    """Keeps the units with the highest scores (per site Float[U]) of the whole model until the budget is used up by their costs.

    The best units of a site stay up to its floor. Among equal scores, those go first that rank lowest inside their own sites.
    """
    ranks = [np.argsort(np.argsort(-score, kind="stable")) for score in scores]
    standing = np.concatenate([(rank + 0.5) / len(rank) for rank in ranks])
    at_floor = np.concatenate([rank < site.floor for rank, site in zip(ranks, layout.sites, strict=True)])
    owner: np.ndarray = np.repeat(np.arange(len(scores)), layout.units)
    order = np.lexsort((standing, -np.concatenate(scores), ~at_floor))
    stays = np.cumsum(layout.costs[owner][order]) <= layout.prunable - removed(ratio, layout)
    kept = np.bincount(owner[order][stays], minlength=len(scores))
    return Policy(np.maximum(kept, layout.floors) / layout.units)
