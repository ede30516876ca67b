"""Training the agent on the predictor's feedback, at every ratio at once.

An evolution strategy whose population lies along the ratios: a policy for every half percent. In each round every policy
has eight rivals at its own ratio: policies of its neighbours, one as it is and the others with a few sites changed; the best
stays. So whatever is found at one ratio spreads to all where it is good, and a policy costs a fraction of what searching its
ratio alone would. Policies jump where a KV group goes, which a table can follow.

benchmarks/agents.py compares it with reinforcement learners on the same questions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ppf.learn.agent import Agent
from ppf.learn.objective import Objective
from ppf.learn.process import NOISE
from ppf.learn.search import STEP_SHARES, exchanged
from ppf.learn.threads import one_thread
from ppf.space.allocation import allocate_many
from ppf.space.budget import removed
from ppf.space.layout import Layout


@dataclass(frozen=True)
class AgentConfig:
    """How to train.

    Attributes:
        steps: Rounds.
        rivals: Allocations that each policy meets in a round.
        reach: How many neighbours away a rival may come from.
        stride: Rows of the table from one policy to the next.
    """

    steps: int = 150
    rivals: int = 8
    reach: int = 4
    stride: int = 5


@one_thread()
def train_agent(
    start: Agent,
    objective: Objective,
    layout: Layout,
    low: float,
    high: float,
    seed: int,
    config: AgentConfig = AgentConfig(),
    advance: Callable[[float], None] = lambda gain: None,
) -> Agent:
    """Trains an agent.

    Args:
        start: The policies to begin with.
        objective: Scores kept units.
        layout: Of the dense model.
        low, high: Range of ratios.
        seed: Of what is tried.
        config: See ``AgentConfig``.
        advance: Told after each round the mean over the ratios of log(damage of the start / damage now).
    """
    bins, rng = len(start.keep) - 1, np.random.default_rng(seed)
    places = _places(bins, low, high, config.stride)
    remove = np.array([removed(place / bins, layout) for place in places], dtype=np.int64)
    best = allocate_many(start.keep[places], remove, layout)
    scores = objective(best)
    first, rivals = np.log(scores + NOISE), config.rivals
    for step in range(config.steps):
        share = STEP_SHARES[step * len(STEP_SHARES) // config.steps]
        away = rng.integers(-config.reach, config.reach + 1, len(places) * rivals)
        giver = np.clip(np.repeat(np.arange(len(places)), rivals) + away, 0, len(places) - 1)
        wishes = exchanged(best[giver] / layout.units, layout.units, share, rng)
        wishes[::rivals] = best[giver[::rivals]] / layout.units
        tried = allocate_many(wishes, np.repeat(remove, rivals), layout)
        found = objective(tried).reshape(len(places), rivals)
        winner = found.argmin(axis=1) + rivals * np.arange(len(places))
        better = found.min(axis=1) < scores
        best[better], scores = tried[winner][better], np.minimum(scores, found.min(axis=1))
        advance(float((first - np.log(scores + NOISE)).mean()))
    return Agent(_filled(start, best / layout.units, places, objective, layout), np.array(high))


def _places(bins: int, low: float, high: float, stride: int) -> np.ndarray:
    """Int[K]: rows of a table of so many bins in which policies are trained, the last one at the end of the range."""
    spaced = np.arange(np.ceil(low * bins), high * bins, stride)
    return np.unique(np.append(spaced, np.floor(high * bins))).astype(np.int64)


def _filled(start: Agent, keep: np.ndarray, places: np.ndarray, objective: Objective, layout: Layout) -> np.ndarray:
    """Float[B + 1, S]: rows between two trained ones take whichever is better there: one of the two, or what they started as."""
    table: np.ndarray = start.keep.astype(np.float32)
    keep = keep.astype(np.float32)  # scored as they are stored: rounding decides between equal remainders
    bins, between = len(table) - 1, np.arange(places[0], places[-1] + 1)
    after = np.searchsorted(places, between)
    rivals = np.stack([keep[after], keep[np.maximum(after - 1, 0)], table[between]])
    remove = np.array([removed(place / bins, layout) for place in between], dtype=np.int64)
    kept = allocate_many(rivals.reshape(-1, rivals.shape[2]), np.tile(remove, len(rivals)), layout)
    winner = objective(kept).reshape(len(rivals), -1).argmin(axis=0)
    table[between] = rivals[winner, np.arange(len(between))]
    return table
