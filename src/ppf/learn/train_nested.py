"""Training nested policies: the best order in which chunks go.

A chunk is a KV group, or a sixteenth of the channels of an FFN. Any order gives nested policies, so it is searched freely:
chunks are moved to other places, which touches the ratios in between and no others.
"""

from collections.abc import Callable

import numpy as np

from ppf.learn.agent import Agent
from ppf.learn.nested import Chain
from ppf.learn.objective import Objective
from ppf.learn.process import NOISE
from ppf.learn.threads import one_thread
from ppf.space.budget import removed
from ppf.space.layout import Layout

NEST_STEPS = 400
_PARTS = 16
_ROWS = 128
_PROPOSALS = 16
_REACHES = (0.3, 0.1, 0.03)
"""How far a chunk is moved, as a share of the chain, from the first third of a search to the last."""


def chain_of(agent: Agent, layout: Layout) -> Chain:
    """The order in which an agent's policies lose their chunks on average, ratio after ratio.

    A chunk goes in the middle between the first ratio at which the agent does without it and the last at which it does not.
    """
    ratios = np.linspace(0, float((layout.units - layout.floors) @ layout.costs / layout.prunable) - 1e-9, 4 * _ROWS)
    kept = agent.kept(ratios, layout)
    free = layout.units - layout.floors
    chunks = np.array(
        [1 if site.kind == "attn" else max(1, -(-units // _PARTS)) for site, units in zip(layout.sites, free, strict=True)]
    )
    sites, times = [], []
    for site, (width, most) in enumerate(zip(chunks, free, strict=True)):
        for count in range(1, -(-most // width) + 1):
            gone = layout.units[site] - kept[:, site] >= min(count * width, most) - width / 2
            first = np.argmax(gone) if gone.any() else len(ratios)
            last = len(ratios) - np.argmin(gone[::-1]) if not gone.all() else 0
            sites.append(site)
            times.append((first + max(first, last)) / 2)
    return Chain(np.array(sites)[np.argsort(times, kind="stable")], chunks, layout)


@one_thread()
def nest(
    agent: Agent,
    objective: Objective,
    layout: Layout,
    low: float,
    high: float,
    seed: int,
    steps: int = NEST_STEPS,
    advance: Callable[[float], None] = lambda gain: None,
) -> Chain:
    """Makes nested policies of free ones, with as little damage as the chain allows.

    Args:
        agent: The free policies.
        objective: Scores kept units.
        layout: Of the dense model.
        low, high: Range of ratios that count, the logarithms of their damages alike.
        seed: Of what is tried.
        steps: Rounds; in each, 16 chunks are moved, and what does less damage stays.
        advance: Told after each round the mean over the ratios of log(damage at the start / damage now).
    """
    rng, chain = np.random.default_rng(seed), chain_of(agent, layout)
    remove = np.array([removed(float(ratio), layout) for ratio in np.linspace(low, high, _ROWS)])
    scores = np.log(objective(chain.kept(remove)) + NOISE)
    first = scores.mean()
    for step in range(steps):
        reach = _REACHES[step * len(_REACHES) // steps] * len(chain.order)
        moved = [_moved(chain, reach, rng) for _ in range(_PROPOSALS)]
        kept = np.stack([other.kept(remove) for other in moved])
        touched = (kept != chain.kept(remove)).any(axis=2)
        if touched.any():
            found = np.tile(scores, (len(moved), 1))
            found[touched] = np.log(objective(kept[touched]) + NOISE)
            best = int(found.mean(axis=1).argmin())
            if found[best].mean() < scores.mean():
                chain, scores = moved[best], found[best]
        advance(float(first - scores.mean()))
    return chain


def _moved(chain: Chain, reach: float, rng: np.random.Generator) -> Chain:
    """The chain with one chunk elsewhere, and often its neighbours of the same site with it."""
    order, place = chain.order, int(rng.integers(len(chain.order)))
    same = np.flatnonzero(order == order[place])
    at = int(np.searchsorted(same, place))
    taken = same[at : at + int(rng.choice([1, 1, 2, 4]))]
    rest: np.ndarray = np.delete(order, taken)
    target = int(np.clip(place + np.rint(rng.normal(0, reach)), 0, len(rest)))
    return Chain(np.insert(rest, target, np.repeat(order[place], len(taken))), chain.chunks, chain.layout)
