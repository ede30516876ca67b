"""Searches that ask an objective and know nothing else: the controls of learning. All meet the budget by ``allocate``.

random_search   scattered policies, the best one
evolution       EvoPress: level switches, survivors chosen at rising cost
cma             covariance matrix adaptation, from the package `cma`
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ppf.errors import ResourceError
from ppf.learn.objective import Objective
from ppf.space.allocation import allocate_many
from ppf.space.layout import Layout

_SCALES = (0.05, 0.1, 0.2, 0.4)
_BATCH = 32
_OFFSPRING, _SURVIVORS = 32, (8, 2, 1)
_SWITCHES, _LEVELS = 3, 16
_SIGMA = 0.1


@dataclass(frozen=True, eq=False)
class Problem:
    """What is searched.

    Attributes:
        tiers: Objectives from cheap to dear, each with what one question costs as a share of one to the last.
        layout: Of the dense model.
        remove: Parameters that must go.
        start: Float[S], wished keep-ratios to begin with.
        evaluations: What may be spent, in questions to the last objective.
        seed: Of what is tried.
    """

    tiers: tuple[tuple[Objective, float], ...]
    layout: Layout
    remove: int
    start: np.ndarray
    evaluations: float
    seed: int

    def allocated(self, keep: np.ndarray) -> np.ndarray:
        """Int[N, S], of Float[N, S] wishes."""
        return allocate_many(keep, np.full(len(keep), self.remove), self.layout)


Search = Callable[[Problem], np.ndarray]
"""Int[S]: the best allocation found."""


def random_search(problem: Problem) -> np.ndarray:
    """Normal noise of several scales around the start."""
    rng, objective = np.random.default_rng(problem.seed), problem.tiers[-1][0]
    count = max(1, int(problem.evaluations))
    noise = rng.normal(0, 1, (count, len(problem.start))) * rng.choice(_SCALES, (count, 1))
    noise[0] = 0
    kept = problem.allocated(problem.start + noise)
    scores = [objective(kept[first : first + _BATCH]) for first in range(0, count, _BATCH)]
    return kept[int(np.concatenate(scores).argmin())]


def evolution(problem: Problem) -> np.ndarray:
    """One parent; its offspring are thinned out by objectives of rising cost, the last of which it has to pass itself.

    Reference: arXiv:2410.14649, section 3 (differs: a level is a sixteenth of a mean site's parameters, so that switches
    between sites of different kinds keep the budget too).
    """
    rng, spent = np.random.default_rng(problem.seed), 0.0
    parent = problem.allocated(problem.start[None])[0]
    survivors = _SURVIVORS[-len(problem.tiers) :]
    while spent < problem.evaluations:
        kept = problem.allocated(np.stack([_switched(parent, problem.layout, rng) for _ in range(_OFFSPRING)]))
        kept = np.unique(kept, axis=0)
        for (objective, cost), stay in zip(problem.tiers, survivors, strict=True):
            if objective is problem.tiers[-1][0]:
                kept = np.concatenate([parent[None], kept])
            scores = objective(kept)
            spent += cost * len(kept)
            kept = kept[np.argsort(scores, kind="stable")[:stay]]
        parent = kept[0]
    return parent


def _switched(kept: np.ndarray, layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Float[S]: wishes in which a few sites give a level of parameters and as many others take one."""
    keep = kept / layout.units
    level = layout.prunable / len(layout.sites) / _LEVELS
    for _ in range(min(rng.integers(1, _SWITCHES + 1, 2))):
        gives, takes = rng.choice(len(keep), 2, replace=False)
        size = max(level, *layout.costs[[gives, takes]])  # at least one unit of either
        keep[gives] -= size / (layout.units[gives] * layout.costs[gives])
        keep[takes] += size / (layout.units[takes] * layout.costs[takes])
    return keep


def cma(problem: Problem) -> np.ndarray:
    """CMA-ES on the wishes.

    Raises:
        ResourceError: The package is not installed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # it misses matplotlib aloud
            from cma import CMAEvolutionStrategy
    except ImportError as error:
        raise ResourceError("CMA-ES needs the package cma; it is missing; pip install 'ppf[bench]'") from error
    rng, objective, start = np.random.default_rng(problem.seed), problem.tiers[-1][0], problem.allocated(problem.start[None])
    best, most = (float(objective(start)[0]), start[0]), problem.evaluations - 1
    # A seed of NaN and its own normal numbers leave numpy's global ones alone.
    options = {"seed": np.nan, "randn": lambda *shape: rng.standard_normal(shape), "verbose": -9, "maxfevals": most}
    strategy = CMAEvolutionStrategy(problem.start, _SIGMA, options)
    while not strategy.stop() and strategy.countevals < most:
        asked = strategy.ask()
        kept = problem.allocated(np.array(asked))
        scores = objective(kept)
        strategy.tell(asked, scores.tolist())
        best = min(best, (float(scores.min()), kept[int(scores.argmin())]), key=lambda pair: pair[0])
    return best[1]


SEARCHES: dict[str, Search] = {"random": random_search, "evolution": evolution, "cma": cma}
