from itertools import product

import numpy as np
import pytest

from builders import layout
from learn_builders import LAYOUT, allocations, truth
from ppf.learn.search import exchanged, refine
from ppf.space.allocation import allocate_many
from ppf.space.budget import Budget, aligned_floors, unit_steps

STARTS = np.random.default_rng(5).normal(0.5, 0.2, (3, len(LAYOUT.sites)))


def searched(starts=STARTS, ratio=0.4, steps=8, seed=0, align=1, objective=None):
    remove = Budget.from_ratio(ratio, LAYOUT, align).remove
    return refine(objective or truth(), starts, remove, LAYOUT, steps, np.random.default_rng(seed), align)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.8])
def test_search_finds_better_and_never_worse_than_its_starts(seed, ratio):
    of = truth(seed)
    remove = Budget.from_ratio(ratio, LAYOUT).remove
    starts = of(allocate_many(STARTS, np.full(3, remove), LAYOUT))
    _, scores = searched(ratio=ratio, seed=seed, objective=of)
    assert scores[0] < starts.min()
    assert set(starts) <= set(scores)


@pytest.mark.parametrize("seed", [0, 1, 3])
def test_search_finds_better_than_as_many_guesses(seed):
    found, scores = searched(np.zeros((1, len(LAYOUT.sites))), steps=20, objective=truth(seed))
    assert scores[0] < truth(seed)(allocations(len(found), 0.4, 1, scale=0.3)).min()


@pytest.mark.parametrize("align", [1, 8, 16])
@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.6])
def test_all_that_is_found_meets_the_budget_and_the_alignment(align, ratio):
    found, _ = searched(ratio=ratio, align=align)
    assert (found >= aligned_floors(LAYOUT, align)).all() and (found <= LAYOUT.units).all()
    assert ((found % unit_steps(LAYOUT, align) == 0) | (found == LAYOUT.units)).all()
    over = (LAYOUT.units - found) @ LAYOUT.costs - Budget.from_ratio(ratio, LAYOUT).remove
    assert (over >= 0).all() and (over < (unit_steps(LAYOUT, align) * LAYOUT.costs).min()).all()


def test_what_is_found_is_distinct_best_first_with_its_score():
    found, scores = searched()
    assert len(np.unique(found, axis=0)) == len(found) > 100
    assert (np.diff(scores) >= 0).all()
    np.testing.assert_array_equal(scores, truth()(found))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ratio", [0.2, 0.35, 0.5])
def test_the_best_of_a_small_problem_is_found(seed, ratio):
    of = layout(layers=2, heads=2, groups=2, head_dim=4, hidden=16, ffn=12)
    everything = np.array(list(product(*(range(floor, units + 1) for floor, units in zip(of.floors, of.units, strict=True)))))
    remove = Budget.from_ratio(ratio, of).remove
    over = (of.units - everything) @ of.costs - remove
    legal = everything[(over >= 0) & (over < of.costs.min())]
    objective = truth(seed, of=of)
    found, scores = refine(objective, np.zeros((1, 4)), remove, of, 12, np.random.default_rng(0))
    assert len(legal) > 20 and scores[0] == objective(legal).min()


def test_no_allocation_is_asked_for_twice_and_no_round_asks_for_more_than_256():
    asked = []

    def objective(kept):
        asked.append(kept.copy())
        return truth()(kept)

    found, _ = searched(objective=objective, steps=10)
    together = np.concatenate(asked)
    assert len(np.unique(together, axis=0)) == len(together) == len(found)
    assert len(asked) <= 11 and max(map(len, asked)) <= 256


def test_a_search_is_decided_by_its_seed():
    one, again, other = (searched(seed=seed)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert len(one) != len(other) or (one != other).any()


def test_no_steps_give_the_starts_and_more_steps_never_worse():
    found, scores = searched(steps=0)
    remove = Budget.from_ratio(0.4, LAYOUT).remove
    starts = np.unique(allocate_many(STARTS, np.full(3, remove), LAYOUT), axis=0)
    assert sorted(found.tolist()) == sorted(starts.tolist())
    assert searched(steps=40)[1][0] <= searched(steps=8)[1][0] < scores[0]


def test_starts_that_are_alike_count_once_and_stay_as_they_are():
    starts = np.repeat(STARTS[:1], 4, axis=0)
    copy = starts.copy()
    found, _ = searched(starts, steps=0)
    assert len(found) == 1
    searched(starts)
    np.testing.assert_array_equal(starts, copy)


def test_nothing_can_be_exchanged_where_nothing_must_go():
    found, _ = searched(ratio=0.0)
    np.testing.assert_array_equal(found, LAYOUT.units[None])


def test_an_exchange_moves_a_few_sites_by_about_a_share():
    units, keep = np.array([4, 48, 400] * 8), np.full((4000, 24), 0.5)
    for share in (0.3, 0.01):
        moved = exchanged(keep, units, share, np.random.default_rng(0)) - keep
        assert (keep == 0.5).all() and moved.shape == keep.shape
        touched = moved != 0
        assert 2 < touched.sum(axis=1).mean() < 5 and abs(moved[touched].mean()) < 0.02
        size = np.array([np.abs(moved[:, units == count][touched[:, units == count]]).mean() for count in (4, 48, 400)])
        expected = 1.2 * np.maximum(1.28 * share, 0.7 / np.array([4, 48, 400]))  # 1.2 and 1.28: means of the two distributions
        np.testing.assert_allclose(size, expected, rtol=0.25)
