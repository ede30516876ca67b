from dataclasses import replace

import numpy as np
import pytest

from ppf.server.controller import Costs, Goal, Load, State, step

COSTS = Costs(np.array([0, 0.2, 0.4, 0.6]), np.array([10.0, 8, 6, 4]), np.array([1000.0, 800, 600, 400]), np.array([10.0, 9, 8, 7]))
LATENCY = Goal(8.0, None, 0.0, 0.6)
MEMORY = Goal(None, 900, 0.0, 0.6)
IDLE = Load(1.0, 0, 0)


def looks(state, loads, goal, costs=COSTS):
    """The ratio after each look."""
    ratios = []
    for load in loads:
        state, _ = step(state, load, goal, costs)
        ratios.append(state.ratio)
    return ratios


def test_it_rises_at_once_to_the_smallest_ratio_that_meets_the_goal():
    state, reason = step(State(0.0), IDLE, LATENCY, COSTS)
    assert state.ratio == pytest.approx(0.2, abs=0.01) and "missed" in reason
    state, _ = step(State(0.0), replace(IDLE, slowdown=1.5), LATENCY, COSTS)
    assert np.interp(state.ratio, COSTS.ratios, COSTS.latency_ms) * 1.5 <= 8
    assert state.ratio == pytest.approx(0.4667, abs=0.01)


def test_a_goal_beyond_reach_takes_the_largest_ratio_and_stays_there():
    assert looks(State(0.0), [replace(IDLE, slowdown=9.0)] * 3, LATENCY) == [0.6] * 3
    assert looks(State(0.0), [IDLE] * 3, Goal(1.0, None, 0.0, 0.3)) == [0.3] * 3


def test_limits_are_kept_whatever_comes():
    goal = Goal(12.0, 2000, 0.1, 0.5)
    rng = np.random.default_rng(0)
    loads = [Load(float(rng.lognormal(0, 1)), int(rng.integers(0, 200)), 1) for _ in range(300)]
    ratios = looks(State(0.3), [*loads, *[IDLE] * 5, *loads], goal)
    assert min(ratios) == 0.1 and max(ratios) == 0.5


def test_it_falls_only_after_several_calm_looks():
    ratios = looks(State(0.6), [IDLE] * 8, LATENCY)
    assert ratios[:3] == [0.6] * 3
    assert ratios[3:] == [pytest.approx(0.32, abs=0.01)] * 5  # with room to spare, then it stays


def test_one_busy_look_makes_it_wait_again():
    busy = replace(IDLE, slowdown=1.9)
    ratios = looks(State(0.6), [IDLE, IDLE, IDLE, busy, IDLE, IDLE, IDLE, IDLE], LATENCY)
    assert ratios[:7] == [0.6] * 7 and ratios[7] < 0.6


def test_a_noisy_load_does_not_make_it_swing():
    rng = np.random.default_rng(1)
    loads = [replace(IDLE, slowdown=float(1.2 * rng.uniform(0.93, 1.07))) for _ in range(400)]
    ratios = looks(State(0.0), loads, LATENCY)
    changes = np.flatnonzero(np.diff(ratios))
    assert len(changes) <= 6 and (np.diff(ratios) >= 0).all()


def test_more_load_never_means_a_larger_model():
    found = [step(State(0.0), replace(IDLE, slowdown=slowdown), LATENCY, COSTS)[0].ratio for slowdown in np.linspace(0.5, 3, 26)]
    assert found == sorted(found) and found[0] == 0 and found[-1] == 0.6


def test_memory_counts_weights_and_caches():
    state, _ = step(State(0.0), IDLE, MEMORY, COSTS)
    assert state.ratio == pytest.approx(0.1, abs=0.01)
    full, _ = step(state, Load(1.0, 20, 1), MEMORY, COSTS)
    weights, caches = (np.interp(full.ratio, COSTS.ratios, costs) for costs in (COSTS.weights, COSTS.kv_bytes))
    assert full.ratio > 0.2 and weights + 20 * caches <= 900


def test_both_goals_are_met():
    state, _ = step(State(0.0), IDLE, replace(LATENCY, memory=500), COSTS)
    assert state.ratio == pytest.approx(0.5, abs=0.01)


def test_it_is_a_function():
    state, load = State(0.3, 2), Load(1.3, 5, 1)
    assert step(state, load, LATENCY, COSTS) == step(state, load, LATENCY, COSTS)
    assert (state, load) == (State(0.3, 2), Load(1.3, 5, 1))


# --- what a ratio costs ---


@pytest.mark.parametrize(("latency", "ratio"), [(99, 0), (10, 0), (9, 0.1), (8, 0.2), (4.5, 0.55), (4, 0.6), (3.9, None)])
def test_the_smallest_ratio_for_a_latency(latency, ratio):
    found = COSTS.ratio_for(latency)
    assert found == (None if ratio is None else pytest.approx(ratio))
    if found is not None:
        assert COSTS.latency_at(found) <= latency + 1e-9


def test_sizes_that_are_equally_fast():
    flat = replace(COSTS, latency_ms=np.array([5.0, 5, 5, 4]))
    assert flat.ratio_for(5) == 0 and flat.ratio_for(4) == 0.6 and 0.4 < flat.ratio_for(4.5) < 0.6
    assert step(State(0.0), IDLE, Goal(6.0, None, 0.0, 0.6), flat) == (State(0.0), "")
