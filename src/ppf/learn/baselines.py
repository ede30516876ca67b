"""Other ways to choose a policy, and the prior that the agent starts from.

    knapsack    the additive optimum for every budget at once, by dynamic programming over damage curves
    refine      local search on an objective at one budget, from given policies
"""

from collections.abc import Sequence

import numpy as np

from ppf.learn.features import Curves
from ppf.learn.objective import Objective
from ppf.space.allocation import allocate_many
from ppf.space.layout import Layout

KNAPSACK_BINS = 1000
_LEVELS = 48
_SWAP_SHARES = (0.3, 0.1, 0.03, 0.01)


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
    choice = np.zeros((sites, bins + 1), dtype=np.int64)
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


def refine(
    objective: Objective, starts: np.ndarray, remove: int, layout: Layout, steps: int, rng: np.random.Generator, align: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Local search at one budget: exchanges between sites, from coarse to fine, several starts side by side.

    Args:
        objective: Scores kept units.
        starts: Float[K, S] wished keep-ratios.
        remove: Parameters that must go.
        layout: Of the dense model.
        steps: Rounds; each asks the objective for up to 256 allocations.
        rng: Source of randomness.
        align: FFN channels stay in multiples of this.

    Returns:
        Int[M, S] distinct allocations, best first, and Float[M] their objective.
    """
    beam = max(2, len(starts))
    kept = np.unique(allocate_many(starts, np.full(len(starts), remove), layout, align), axis=0)
    scores = objective(kept)
    seen: dict[bytes, tuple[float, np.ndarray]] = {row.tobytes(): (score, row) for row, score in zip(kept, scores, strict=True)}
    for step in range(steps):
        share = _SWAP_SHARES[min(step * len(_SWAP_SHARES) // steps, len(_SWAP_SHARES) - 1)]
        elite = [row for _, row in sorted(seen.values(), key=lambda item: item[0])[:beam]]
        wishes = np.concatenate([_exchanges(row / layout.units, layout.units, share, 256 // len(elite), rng) for row in elite])
        moved = np.unique(allocate_many(wishes, np.full(len(wishes), remove), layout, align), axis=0)
        new = [row for row in moved if row.tobytes() not in seen]
        if new:
            for row, score in zip(new, objective(np.array(new)), strict=True):
                seen[row.tobytes()] = (score, row)
    ranked: Sequence[tuple[float, np.ndarray]] = sorted(seen.values(), key=lambda item: item[0])
    return np.array([row for _, row in ranked]), np.array([score for score, _ in ranked])


def _exchanges(keep: np.ndarray, units: np.ndarray, share: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Float[count, S]: wishes in which a few sites give or take, at least one unit; ``allocate`` balances the rest."""
    few = rng.random((count, len(keep))) < rng.choice([1.5, 3, 6], (count, 1)) / len(keep)
    size = np.maximum(share * np.exp(rng.normal(0, 0.7, (count, 1))), 0.7 / units)
    return keep + few * rng.normal(0, 1.5, (count, len(keep))) * size
