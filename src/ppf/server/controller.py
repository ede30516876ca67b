"""The controller: which ratio the load asks for. A pure function of what was measured; no clock, no thread, no model.

It rises at once when a goal is missed, to the smallest ratio that meets it, with a little memory to spare. It falls only
after many looks in a row at which a smaller ratio would meet the goal with room to spare, and only to one that would have done
at every one of them, so that neither a load near a limit nor requests that come and go make it swing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

_WHOLE = {"latency": 1.0, "memory": 1.0}
"""The share of a goal that the ratio in use may need."""
_RISEN = {"latency": 1.0, "memory": 0.95}
"""That a larger ratio may need to be risen to: requests that took room go on to take more, which were a change each time."""
_ROOM = {"latency": 0.85, "memory": 0.95}
"""That a smaller ratio may need to be fallen to: times are noisy."""
_PATIENCE = 40
"""Looks: with two a second, longer than times are remembered (metrics.py) and than most requests take."""
LEAST = 0.01
"""Changes of the ratio below this are not worth one."""
_SAME = 1e-6
_ENOUGH = 8
_NOISE = 0.05
"""What an idle time is known to; without it a running minimum would creep down for ever."""


@dataclass(frozen=True)
class Goal:
    """What is aimed at, and the ratios to choose among.

    Attributes:
        latency_ms: A token takes at most so long; None: no matter.
        memory: Weights in use and KV caches take at most so many bytes; None: no matter.
        low: The smallest ratio.
        high: The largest ratio.
    """

    latency_ms: float | None
    memory: int | None
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Costs:
    """What a ratio costs on an idle machine.

    Attributes:
        ratios: Float[N], rising.
        latency_ms: Float[N] of one token.
        weights: Float[N] bytes.
        kv_bytes: Float[N] bytes of one token in a KV cache.
    """

    ratios: np.ndarray
    latency_ms: np.ndarray
    weights: np.ndarray
    kv_bytes: np.ndarray

    def latency_at(self, ratio: float) -> float:
        """Milliseconds of one token at a ratio between those timed."""
        return float(np.interp(ratio, self.ratios, self.latency_ms))

    def ratio_for(self, latency_ms: float) -> float | None:
        """The smallest ratio at which a token takes at most so long; None if none does."""
        if latency_ms < self.latency_ms[-1]:
            return None
        if latency_ms >= self.latency_ms[0]:
            return float(self.ratios[0])
        return float(np.interp(-latency_ms, -self.latency_ms, self.ratios))

    def slowdown(self, times: Sequence[tuple[float, float]]) -> float:
        """How many times as long tokens take as on the idle machine, by the median.

        Args:
            times: Ratio and milliseconds of each token.

        Returns:
            1 if there is none.
        """
        if not times:
            return 1.0
        ratios, latency = np.array(times).T
        shares = latency / np.interp(ratios, self.ratios, self.latency_ms)
        untimed = ratios > self.ratios[-1] + _SAME  # smaller models are faster anyhow, which tells of no faster machine
        return float(np.median(np.where(untimed, np.maximum(shares, 1.0), shares)))

    def learned(self, times: Sequence[tuple[float, float]]) -> "Costs":
        """These costs, or faster ones if tokens were made faster than an idle machine was thought to make them.

        They were timed at start, perhaps beside other work. No load makes tokens faster, so the shortest time seen is the best
        known one; the median of many tokens is taken, which no odd one moves.

        Args:
            times: As for ``slowdown``.
        """
        share = self.slowdown(times) if len(times) >= _ENOUGH else 1.0
        return replace(self, latency_ms=self.latency_ms * share) if share < 1 - _NOISE else self


@dataclass(frozen=True)
class Load:
    """What there is to carry.

    Attributes:
        slowdown: How many times as long a token took as on the idle machine; 1 if none was made.
        tokens: For which requests that follow the ratio hold room in KV caches.
        own_weights: Bytes of the weights that other requests read, which have ratios of their own.
        own_caches: Bytes for which those hold room.
    """

    slowdown: float
    tokens: int
    own_weights: int = 0
    own_caches: int = 0


@dataclass(frozen=True)
class State:
    """Where the controller stands.

    Attributes:
        ratio: That it chose.
        calm: Looks in a row at which a smaller one would have done.
        peak: The largest that was needed meanwhile, with room to spare.
    """

    ratio: float
    calm: int = 0
    peak: float = 0.0


def rise(state: State, load: Load, goal: Goal, costs: Costs) -> tuple[State, str]:
    """Looks out of turn, where the load has just grown; see ``step``. It never falls."""
    needed = _smallest(load, goal, costs, _WHOLE)
    if needed > state.ratio + LEAST or (needed > state.ratio and needed == goal.high):
        seen = "" if goal.latency_ms is None else f"slowdown {load.slowdown:.2f} and "
        reason = f"a goal would be missed at {seen}{load.tokens} tokens of KV cache"
        return State(_smallest(load, goal, costs, _RISEN)), reason
    return replace(state, peak=max(state.peak, _smallest(load, goal, costs, _ROOM))), ""


def step(state: State, load: Load, goal: Goal, costs: Costs) -> tuple[State, str]:
    """Looks once.

    Returns:
        Where it stands now, and why; no reason if the ratio stays.
    """
    now, reason = rise(state, load, goal, costs)
    if reason:
        return now, reason
    if now.peak >= state.ratio - LEAST:
        return State(state.ratio), ""
    if state.calm + 1 < _PATIENCE:
        return replace(now, calm=state.calm + 1), ""
    return State(now.peak), f"a smaller ratio has been enough {_PATIENCE} times in a row"


def _smallest(load: Load, goal: Goal, costs: Costs, share: dict[str, float]) -> float:
    """The smallest ratio that needs at most its share of each goal; the largest allowed if none does."""
    grid = np.linspace(goal.low, goal.high, 101)
    fits: np.ndarray = np.ones(len(grid), dtype=bool)
    if goal.latency_ms is not None:
        fits &= np.interp(grid, costs.ratios, costs.latency_ms) * load.slowdown <= share["latency"] * goal.latency_ms
    if goal.memory is not None:
        weights = np.maximum(np.interp(grid, costs.ratios, costs.weights), load.own_weights)
        used = weights + load.tokens * np.interp(grid, costs.ratios, costs.kv_bytes) + load.own_caches
        fits &= used <= share["memory"] * goal.memory
    return float(grid[fits][0]) if fits.any() else goal.high
