"""The controller: which ratio the load asks for. A pure function of what was measured; no clock, no thread, no model.

It rises at once when a goal is missed, to the smallest ratio that meets it. It falls only after several looks in a row at
which a smaller ratio would meet the goal with room to spare, so that a load near a limit does not make it swing.
"""

from dataclasses import dataclass

import numpy as np

_ROOM = {"latency": 0.85, "memory": 0.97}
"""The share of a goal that a smaller ratio may need before the controller falls to it; memory is known without noise."""
_WHOLE = {"latency": 1.0, "memory": 1.0}
_PATIENCE = 4
_LEAST = 0.01
"""Changes of the ratio below this are not worth one."""


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


@dataclass(frozen=True)
class Load:
    """What was measured since the last look.

    Attributes:
        slowdown: How many times as long a token took as on the idle machine; 1 if none was made.
        cached_tokens: In all KV caches together.
        running: Requests under way.
    """

    slowdown: float
    cached_tokens: int
    running: int


@dataclass(frozen=True)
class State:
    """Where the controller stands.

    Attributes:
        ratio: That it chose.
        calm: Looks in a row at which a smaller one would have done.
    """

    ratio: float
    calm: int = 0


def step(state: State, load: Load, goal: Goal, costs: Costs) -> tuple[State, str]:
    """Looks once.

    Returns:
        Where it stands now, and why; no reason if the ratio stays.
    """
    needed = _smallest(load, goal, costs, _WHOLE)
    if needed > state.ratio + _LEAST or (needed > state.ratio and needed == goal.high):
        return State(needed), f"a goal is missed at slowdown {load.slowdown:.2f} and {load.cached_tokens} cached tokens"
    enough = _smallest(load, goal, costs, _ROOM)
    if enough >= state.ratio - _LEAST:
        return State(state.ratio), ""
    if state.calm + 1 < _PATIENCE:
        return State(state.ratio, state.calm + 1), ""
    return State(enough), f"a smaller ratio has been enough {_PATIENCE} times in a row"


def _smallest(load: Load, goal: Goal, costs: Costs, share: dict[str, float]) -> float:
    """The smallest ratio that needs at most its share of each goal; the largest allowed if none does."""
    grid = np.linspace(goal.low, goal.high, 101)
    fits: np.ndarray = np.ones(len(grid), dtype=bool)
    if goal.latency_ms is not None:
        fits &= np.interp(grid, costs.ratios, costs.latency_ms) * load.slowdown <= share["latency"] * goal.latency_ms
    if goal.memory is not None:
        used = np.interp(grid, costs.ratios, costs.weights) + load.cached_tokens * np.interp(grid, costs.ratios, costs.kv_bytes)
        fits &= used <= share["memory"] * goal.memory
    return float(grid[fits][0]) if fits.any() else goal.high
