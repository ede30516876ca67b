"""Policies that need no search: the additive optimum, which is also the prior that the agent starts from."""

import numpy as np

from ppf.learn.features import Curves
from ppf.space.layout import Layout

KNAPSACK_BINS = 1000
_LEVELS = 48


def knapsack(curves: Curves, layout: Layout, bins: int = KNAPSACK_BINS) -> np.ndarray:
    """For every budget the kept units with the least sum of single-site damages.

    Exact over at most 48 counts a site and budgets in ``bins`` equal steps; a site's cost is rounded up.

    Args:
        curves: Single-site damages.
        layout: Of the dense model.
        bins: Steps of the budget.

    Returns:
        Float[bins + 1, S], row b: wished keep-ratio when at least the share b / bins of the prunable parameters goes.
        Rows beyond what the floors allow repeat the last that they do.
    """
    sites = len(layout.sites)
    best = np.zeros(bins + 1)
    best[1:] = np.inf
    choice: np.ndarray = np.zeros((sites, bins + 1), dtype=np.int64)
    for index, site in enumerate(layout.sites):
        counts = np.unique(np.linspace(site.floor, site.units, min(_LEVELS, site.units - site.floor + 1)).round().astype(int))[::-1]
        gain = np.floor((site.units - counts) * site.cost / layout.prunable * bins + 1e-9).astype(int)
        damage = curves.site(index)[counts]
        need = np.maximum(np.arange(bins + 1)[:, None] - gain, 0)
        total = best[need] + damage
        pick = total.argmin(axis=1)
        choice[index], best = counts[pick], total[np.arange(bins + 1), pick]
    rows = np.zeros((bins + 1, sites))
    left = np.arange(bins + 1)
    for index in reversed(range(sites)):
        kept = choice[index][left]
        rows[:, index] = kept / layout.units[index]
        gain = np.floor((layout.units[index] - kept) * layout.costs[index] / layout.prunable * bins + 1e-9).astype(int)
        left = np.maximum(left - gain, 0)
    last = int(np.flatnonzero(np.isfinite(best))[-1])
    rows[last:] = rows[last]
    return rows
