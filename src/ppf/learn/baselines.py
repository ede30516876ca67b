"""Policies that need no search: the additive optimum, which is also the prior that the agent starts from."""

import numpy as np

from ppf.learn.features import Curves
from ppf.space.layout import Layout

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
