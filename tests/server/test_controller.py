from dataclasses import replace

import numpy as np
import pytest

from ppf.server import controller
from ppf.server.controller import Costs, Goal, Load, State, rise, step

COSTS = Costs(np.array([0, 0.2, 0.4, 0.6]), np.array([10.0, 8, 6, 4]), np.array([1000.0, 800, 600, 400]), np.array([10.0, 9, 8, 7]))
LATENCY = Goal(8.0, None, 0.0, 0.6)
MEMORY = Goal(None, 900, 0.0, 0.6)
IDLE = Load(1.0, 0)
CALM = controller._PATIENCE


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
    loads = [Load(float(rng.lognormal(0, 1)), int(rng.integers(0, 200))) for _ in range(300)]
    ratios = looks(State(0.3), [*loads, *[IDLE] * (CALM + 1), *loads], goal)
    assert min(ratios) == 0.1 and max(ratios) == 0.5


def test_it_falls_only_after_many_calm_looks():
    ratios = looks(State(0.6), [IDLE] * 2 * CALM, LATENCY)
    assert ratios[: CALM - 1] == [0.6] * (CALM - 1)
    assert ratios[CALM - 1 :] == [pytest.approx(0.32, abs=0.01)] * (CALM + 1)  # with room to spare, then it stays


def test_one_busy_look_makes_it_wait_again():
    busy = replace(IDLE, slowdown=1.9)
    ratios = looks(State(0.6), [IDLE] * (CALM - 1) + [busy] + [IDLE] * CALM, LATENCY)
    assert ratios[:-1] == [0.6] * (2 * CALM - 1) and ratios[-1] < 0.6


def test_it_falls_no_farther_than_any_of_the_looks_allowed():
    half_busy, state = replace(IDLE, slowdown=1.3), State(0.6)
    lowest = looks(State(0.6), [half_busy] * CALM, LATENCY)[-1]
    assert looks(state, [half_busy] + [IDLE] * (CALM - 1), LATENCY)[-1] == lowest > 0.4
    state, reason = rise(state, half_busy, LATENCY, COSTS)  # a look out of turn is no calm one, yet what it saw counts
    assert (state.ratio, state.calm, reason) == (0.6, 0, "")
    assert looks(state, [IDLE] * CALM, LATENCY) == [0.6] * (CALM - 1) + [lowest]


def test_a_look_out_of_turn_rises_at_once_and_never_falls():
    state, reason = rise(State(0.0), Load(1.0, 20), MEMORY, COSTS)
    assert state.ratio > 0.2 and "missed" in reason
    for _ in range(2 * CALM):
        state, _ = rise(state, IDLE, MEMORY, COSTS)
    assert state.ratio > 0.2


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
    assert state.ratio == pytest.approx(0.145, abs=0.01)  # a little more than it must be, so that the next token needs no change
    full, _ = step(state, Load(1.0, 20), MEMORY, COSTS)
    weights, caches = (np.interp(full.ratio, COSTS.ratios, costs) for costs in (COSTS.weights, COSTS.kv_bytes))
    assert full.ratio > 0.2 and weights + 20 * caches <= 900


def test_requests_of_their_own_ratio_leave_less_for_the_others():
    alone, beside = (step(State(0.0), Load(1.0, 10, 0, own), MEMORY, COSTS)[0].ratio for own in (0, 200))
    assert beside > alone + 0.15
    assert (
        step(State(0.0), Load(1.0, 0, 850), MEMORY, COSTS)[0].ratio
        < step(State(0.0), Load(1.0, 0, 950), MEMORY, COSTS)[0].ratio
        == 0.6
    )


def test_both_goals_are_met():
    state, _ = step(State(0.0), IDLE, replace(LATENCY, memory=500), COSTS)
    assert state.ratio == pytest.approx(0.525, abs=0.01)


def test_it_is_a_function():
    state, load = State(0.3, 2), Load(1.3, 5)
    assert step(state, load, LATENCY, COSTS) == step(state, load, LATENCY, COSTS)
    assert (state, load) == (State(0.3, 2), Load(1.3, 5))


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


# --- costs that were timed on a busy machine ---


def test_slowdown_is_the_median_of_tokens_each_against_its_own_ratio():
    assert COSTS.slowdown([]) == 1
    assert COSTS.slowdown([(0.0, 10), (0.2, 16), (0.4, 18)]) == pytest.approx(2)


def test_tokens_faster_than_an_idle_machine_was_thought_to_make_them_bring_costs_down():
    rng = np.random.default_rng(0)
    true, costs = COSTS.latency_ms, replace(COSTS, latency_ms=3 * COSTS.latency_ms)
    for busy in (2.5, 1.5, 1.0, 1.0, 2.0, 1.0):  # what else the machine does, from time to time
        ratios = rng.choice(COSTS.ratios, 30)
        times = [(float(ratio), COSTS.latency_at(ratio) * busy * rng.uniform(0.97, 1.03)) for ratio in ratios]
        before, costs = costs, costs.learned(times)
        assert (costs.latency_ms <= before.latency_ms).all() and costs.learned(times) is costs  # the same times teach but once
    assert costs.latency_ms == pytest.approx(true, rel=0.06)
    assert (costs.weights == COSTS.weights).all() and costs.ratio_for(8) == pytest.approx(0.2, abs=0.06)


def test_tokens_of_a_smaller_model_than_any_that_was_timed_tell_of_load_alone():
    fast, slow = [(0.9, 1.0)] * 50, [(0.9, 12.0)] * 50  # at 0.6 it were 4 ms
    assert COSTS.learned(fast) is COSTS and COSTS.slowdown(fast) == 1 and COSTS.slowdown(slow) == pytest.approx(3)
    assert COSTS.learned([(0.6, 2.0)] * 50).latency_ms[-1] == pytest.approx(2)


@pytest.mark.parametrize("times", [[], [(0.0, 1.0)] * 7, [(0.0, 0.1)] + [(0.0, 10.0)] * 9, [(0.2, 30.0)] * 50, [(0.2, 7.8)] * 50])
def test_few_tokens_odd_ones_slow_ones_and_noise_teach_nothing(times):
    assert COSTS.learned(times) is COSTS
