import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import LAYOUTS, examples, layout, refuses
from ppf.errors import InputError
from ppf.space.allocation import allocate
from ppf.space.budget import Budget, aligned_floors, unit_steps
from ppf.space.policy import Policy


@st.composite
def problems(draw):
    """A model that can be split, into how many parts, an alignment, a wish per site, and the share that must go."""
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    groups = tp * draw(st.integers(1, 4))
    of = layout(draw(st.integers(1, 4)), groups * draw(st.integers(1, 3)), groups, 4, 16, tp * draw(st.integers(10, 120)))
    keep = draw(st.lists(st.floats(-2, 3), min_size=len(of.sites), max_size=len(of.sites)))
    return of, draw(st.sampled_from([1, 8, 32])), tp, np.array(keep), draw(st.floats(0, 1))


@examples(300)
@given(problems())
def test_every_layer_can_be_split_evenly_and_the_budget_is_met(problem):
    of, align, tp, keep, share = problem
    floors = aligned_floors(of, align, tp)
    remove = int(share * ((of.units - floors) @ of.costs))
    kept = allocate(Policy(keep), Budget(remove), of, align, tp).kept
    assert (kept % tp == 0).all() and (kept >= floors).all() and (kept <= of.units).all()
    assert ((kept[1::2] % math.lcm(align, tp) == 0) | (kept[1::2] == of.units[1::2])).all()
    assert kept @ of.costs <= of.prunable - remove


@pytest.mark.parametrize("tp", [2, 4, 8])
@pytest.mark.parametrize("align", [1, 64, 128])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_large_models_meet_the_budget_to_within_one_step(tp, align, ratio):
    of = LAYOUTS["llama-3-8b"]
    keep = np.random.default_rng(tp).normal(0.6, 0.2, len(of.sites))
    budget = Budget.from_ratio(ratio, of, align, tp)
    over = of.prunable - allocate(Policy(keep), budget, of, align, tp).kept @ of.costs - budget.remove
    assert 0 <= over < (unit_steps(of, align, tp) * of.costs).min()


def test_one_device_changes_nothing():
    of = LAYOUTS["llama-2-7b"]
    keep = Policy(np.random.default_rng(0).random(len(of.sites)))
    budget = Budget.from_ratio(0.4, of, 32)
    np.testing.assert_array_equal(allocate(keep, budget, of, 32).kept, allocate(keep, budget, of, 32, 1).kept)


def test_the_floors_rise_so_that_less_can_go():
    of = LAYOUTS["llama-3-8b"]
    assert aligned_floors(of, 1, 8)[::2].tolist() == [8] * of.layers
    Budget.from_ratio(0.9, of, 1, 4)
    with refuses(InputError):
        Budget.from_ratio(0.99, of, 1, 8)


@pytest.mark.parametrize(
    ("shape", "words"), [({"groups": 2, "heads": 4}, "2 KV groups"), ({"groups": 3, "heads": 3, "ffn": 100}, "100")]
)
def test_a_model_that_cannot_be_split_is_refused(shape, words):
    with refuses(InputError) as caught:
        unit_steps(layout(**shape), 1, 3)
    assert words in str(caught.value) and "--tp" in str(caught.value)


@pytest.mark.parametrize("tp", [0, -2, 1.5, True, "2", None])
def test_what_is_no_number_of_devices_is_refused(tp):
    with refuses(InputError):
        unit_steps(layout(), 1, tp)
