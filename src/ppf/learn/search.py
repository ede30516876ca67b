"""Search on an objective at one budget. Budgets are met by ``allocate``, so any exchange between sites is a legal move."""

from collections.abc import Sequence

import numpy as np

from ppf.learn.objective import Objective
from ppf.learn.threads import one_thread
from ppf.space.allocation import allocate_many
from ppf.space.layout import Layout

STEP_SHARES = (0.3, 0.1, 0.03, 0.01)
"""How far sites move, in keep-ratio, from the first quarter of a search to the last."""
_PROPOSALS = 256


@one_thread()
def refine(
    objective: Objective, starts: np.ndarray, remove: int, layout: Layout, steps: int, rng: np.random.Generator, *grid: int
) -> tuple[np.ndarray, np.ndarray]:
    """Local search at one budget: exchanges between sites, from coarse to fine, several starts side by side.

    Args:
        objective: Scores kept units.
        starts: Float[K, S] wished keep-ratios.
        remove: Parameters that must go.
        layout: Of the dense model.
        steps: Rounds; each asks the objective for up to 256 allocations.
        rng: Source of randomness.
        grid: ``align`` and ``tp``, as in ``allocate``.

    Returns:
        Int[M, S] distinct allocations, best first, and Float[M] their objective.
    """
    beam = max(2, len(starts))
    kept = np.unique(allocate_many(starts, np.full(len(starts), remove), layout, *grid), axis=0)
    scores = objective(kept)
    seen: dict[bytes, tuple[float, np.ndarray]] = {row.tobytes(): (score, row) for row, score in zip(kept, scores, strict=True)}
    for step in range(steps):
        share = STEP_SHARES[min(step * len(STEP_SHARES) // steps, len(STEP_SHARES) - 1)]
        elite = [row for _, row in sorted(seen.values(), key=lambda item: item[0])[:beam]]
        wishes = np.concatenate(
            [exchanged(np.tile(row / layout.units, (_PROPOSALS // len(elite), 1)), layout.units, share, rng) for row in elite]
        )
        moved = np.unique(allocate_many(wishes, np.full(len(wishes), remove), layout, *grid), axis=0)
        new = [row for row in moved if row.tobytes() not in seen]
        if new:
            for row, score in zip(new, objective(np.array(new)), strict=True):
                seen[row.tobytes()] = (score, row)
    ranked: Sequence[tuple[float, np.ndarray]] = sorted(seen.values(), key=lambda item: item[0])
    return np.array([row for _, row in ranked]), np.array([score for score, _ in ranked])


def exchanged(keep: np.ndarray, units: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Float[N, S]: wishes in which a few sites give or take, at least one unit; ``allocate`` balances the rest."""
    count, sites = keep.shape
    few = rng.random((count, sites)) < rng.choice([1.5, 3, 6], (count, 1)) / sites
    size = np.maximum(share * np.exp(rng.normal(0, 0.7, (count, 1))), 0.7 / units)
    return keep + few * rng.normal(0, 1.5, (count, sites)) * size
