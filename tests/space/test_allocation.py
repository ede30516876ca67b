from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from builders import LAYOUTS, examples, layout, refuses
from ppf.errors import InputError
from ppf.space.allocation import Allocation, allocate, allocate_many
from ppf.space.budget import Budget, aligned_floors, unit_steps
from ppf.space.policy import Policy

ALIGNS = [1, 32, 64, 128, 256]
EXTREMES = [0.0, 1.0, -1.0, 0.5, 1e-9, 10.0, -1e6, 1e12, -1e100]


@st.composite
def problems(draw):
    """A small model, an alignment, a wish per site, and the share of what can go that must go."""
    heads, per_group = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    of = layout(
        draw(st.integers(1, 4)), heads * per_group, heads, draw(st.sampled_from([4, 16])), draw(st.sampled_from([16, 64])),
        draw(st.integers(40, 400)),
    )  # fmt: skip
    wish = st.floats(-2, 3) | st.sampled_from(EXTREMES)
    keep = draw(st.lists(wish, min_size=len(of.sites), max_size=len(of.sites)))
    return of, draw(st.sampled_from([1, 8, 32, 64])), np.array(keep), draw(st.floats(0, 1))


def budget_of(of, align, share):
    return Budget(int(share * ((of.units - aligned_floors(of, align)) @ of.costs)))


def check(kept, budget, of, align):
    """Whole units within floors and alignment, and the budget met to within one step."""
    steps, floors = unit_steps(of, align), aligned_floors(of, align)
    assert kept.dtype == np.int64 and kept.shape == (len(of.sites),)
    assert (kept >= floors).all() and (kept <= of.units).all()
    assert ((kept % steps == 0) | (kept == of.units)).all()
    over = of.prunable - kept @ of.costs - budget.remove
    assert 0 <= over < (steps * of.costs).min()


def steps_mix(of, align):
    """Whether the small steps together outweigh one large step, without which no rounding can meet a budget closely."""
    room, step = (of.units - aligned_floors(of, align)) * of.costs, unit_steps(of, align) * of.costs
    return room[step == step.min()].sum() >= step.max()


@examples(100)
@given(problems())
def test_floors_of_nothing_are_met_as_any_others(problem):
    """A floor of 0: whole sub-layers may go, all but one."""
    of, align, keep, share = problem
    of = replace(of, sites=(of.sites[0], *(replace(site, floor=0, rest=7) for site in of.sites[1:])))
    assume(steps_mix(of, align))
    budget = budget_of(of, align, share)
    kept = allocate(Policy(keep), budget, of, align).kept
    check(kept, budget, of, align)
    assert of.ratio(kept) * of.prunable >= budget.remove - 1e-3
    assert of.total - of.kept_params(kept) == (of.units - kept) @ of.costs + 7 * (kept[1:] == 0).sum()


@examples(300)
@given(problems())
@example((layout(1, 8, 8, 4, 16, 85), 32, np.array([-0.5, 0.5]), 0.467))
def test_any_policy_meets_any_budget(problem):
    of, align, keep, share = problem
    assume(steps_mix(of, align))
    budget = budget_of(of, align, share)
    check(allocate(Policy(keep), budget, of, align).kept, budget, of, align)


@examples(100)
@given(problems())
def test_a_budget_is_never_missed_even_where_steps_are_coarse(problem):
    of, align, keep, share = problem
    budget = budget_of(of, align, share)
    kept = allocate(Policy(keep), budget, of, align).kept
    assert kept @ of.costs <= of.prunable - budget.remove
    assert (kept >= aligned_floors(of, align)).all()


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b"])
def test_real_models_meet_every_budget(name, align):
    of, rng = LAYOUTS[name], np.random.default_rng(align)
    shares = [0.0, 1e-9, 0.1, 0.3, 0.5, 0.77, 0.999999, 1.0]
    for share in shares:
        budget = budget_of(of, align, share)
        for keep in (rng.random(len(of.sites)), rng.normal(size=len(of.sites)) * 1e3, rng.choice(EXTREMES, len(of.sites))):
            check(allocate(Policy(keep), budget, of, align).kept, budget, of, align)


@pytest.mark.parametrize("size", [1e200, 1e304, 1.7e308])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_numbers_are_wishes_too(size, sign):
    of = LAYOUTS["llama-2-7b"]
    keep = np.zeros(len(of.sites))
    keep[3] = sign * size
    budget = Budget.from_ratio(0.3, of)
    check(allocate(Policy(keep), budget, of).kept, budget, of, 1)


@pytest.mark.parametrize("size", [10, 1e6, 1e12, 1e15])
def test_one_outlier_leaves_the_other_sites_alike(size):
    of = LAYOUTS["llama-2-7b"]
    keep = np.zeros(len(of.sites))
    keep[3] = size
    kept = allocate(Policy(keep), Budget.from_ratio(0.3, of), of).kept
    assert kept[3] == of.units[3]
    share = np.delete(kept / of.units, 3)
    assert np.ptp(share) < 1 / 32 + 1e-3


@examples(50)
@given(st.integers(0, 2**32 - 1), st.floats(1, 1e3), st.sampled_from(sorted(LAYOUTS)))
def test_a_gap_above_one_is_like_any_other(seed, size, name):
    of, rng = LAYOUTS[name], np.random.default_rng(seed)
    gaps, order = rng.random(len(of.sites)), rng.permutation(len(of.sites))
    wide = rng.random(len(of.sites)) < 0.2
    budget = budget_of(of, 1, rng.random())
    one, large = (allocate(Policy(np.where(wide, gap, gaps).cumsum()[order]), budget, of).kept for gap in (1, size))
    assert np.abs(one - large).max() <= 1


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b"])
def test_one_offset_leads_from_the_wishes_to_what_is_kept(name):
    of, rng = LAYOUTS[name], np.random.default_rng(0)
    for share in (0.1, 0.4, 0.8):
        keep = rng.normal(0.5, 0.3, len(of.sites))
        kept = allocate(Policy(keep), budget_of(of, 1, share), of).kept
        free, ffn = (kept > of.floors) & (kept < of.units), of.units > 32
        offset = kept / of.units - keep
        for sites, unit in ((free & ffn, 1 / of.units.max()), (free & ~ffn, 1 / of.units.min())):
            assert sites.sum() > 3 and np.ptp(offset[sites]) <= unit
        assert (keep + offset[free & ffn].mean() <= 1 / of.units)[ffn & (kept == of.floors)].all()
        assert (keep + offset[free & ffn].mean() >= 1 - 1 / of.units)[ffn & (kept == of.units)].all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_policy_that_is_not_finite_is_refused(value):
    keep = np.zeros((2, 4))
    keep[1, 2] = value
    with refuses(InputError):
        allocate_many(keep, np.array([100, 100]), layout())


@examples(100)
@given(st.integers(0, 2**32 - 1), st.floats(-100, 100), st.sampled_from(sorted(LAYOUTS)), st.sampled_from([1, 32]))
def test_a_common_offset_changes_nothing(seed, offset, name, align):
    of = LAYOUTS[name]
    keep = np.random.default_rng(seed).normal(0.5, 0.3, len(of.sites))
    budget = budget_of(of, align, 0.4)
    before, after = (allocate(Policy(wish), budget, of, align).kept for wish in (keep, keep + offset))
    np.testing.assert_array_equal(before, after)


@examples(100)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.1, 1 / 3, -0.7, 5.3]), st.floats(0.05, 0.95))
@example(0, 0.1, 0.3)
def test_a_common_offset_changes_nothing_where_wishes_tie(seed, offset, share):
    of = LAYOUTS["llama-2-7b"]
    keep = np.random.default_rng(seed).choice([0.25, 0.5, 0.75], len(of.sites))
    budget = budget_of(of, 1, share)
    before, after = (allocate(Policy(wish), budget, of).kept for wish in (keep, keep + offset))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("align", ALIGNS)
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b"])
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5])
def test_uniform_keeps_one_share_everywhere(name, align, ratio):
    of = LAYOUTS[name]
    kept = allocate(Policy.uniform(of), Budget.from_ratio(ratio, of, align), of, align).kept
    spread = np.abs(kept - (1 - ratio) * of.units) / unit_steps(of, align)
    assert spread[::2].max() <= 1 and np.ptp(kept[::2]) <= 1
    assert np.ptp(kept[1::2]) <= align and spread[1::2].max() <= 2 + 0.02 * of.units[1] / align


@examples(100)
@given(problems())
def test_a_larger_wish_never_keeps_less(problem):
    of, align, keep, share = problem
    steps = unit_steps(of, align)
    kept = allocate(Policy(keep), budget_of(of, align, share), of, align).kept
    for sites in (slice(0, None, 2), slice(1, None, 2)):
        more = keep[sites][:, None] > keep[sites][None]
        assert (kept[sites][:, None] - kept[sites][None] + steps[sites][:, None] >= 0)[more].all()


@pytest.mark.parametrize(("shares", "channels"), [([0.403, 0.407], [40, 41]), ([0.407, 0.403], [41, 40]), ([0.5, 0.31], [50, 31])])
def test_what_is_left_goes_to_whoever_lost_most_by_rounding(shares, channels):
    of = layout(groups=1, heads=1, ffn=100)
    keep = np.insert(shares, [0, 1], 1.0)
    kept = allocate(Policy(keep), Budget((200 - 81) * of.costs[1]), of).kept
    assert kept.tolist() == [1, channels[0], 1, channels[1]]


@examples(50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(sorted(LAYOUTS)), st.sampled_from([1, 8, 64]))
def test_a_batch_is_its_rows(seed, name, align):
    of, rng = LAYOUTS[name], np.random.default_rng(seed)
    keep = rng.normal(0.5, rng.choice([0.1, 1, 1e4]), (6, len(of.sites)))
    budgets = [budget_of(of, align, share) for share in rng.random(6)]
    batch = allocate_many(keep, np.array([budget.remove for budget in budgets]), of, align)
    for row, wish, budget in zip(batch, keep, budgets, strict=True):
        np.testing.assert_array_equal(row, allocate(Policy(wish), budget, of, align).kept)


def test_an_empty_batch_is_empty():
    assert allocate_many(np.zeros((0, 4)), np.zeros(0), layout()).shape == (0, 4)


def test_what_is_given_stays_as_it_is():
    of, keep, remove = layout(), np.random.default_rng(0).normal(size=(3, 4)), np.array([0, 9_000, 20_000])
    copies = keep.copy(), remove.copy()
    allocate_many(keep, remove, of, 8)
    np.testing.assert_array_equal(keep, copies[0])
    np.testing.assert_array_equal(remove, copies[1])


def test_an_allocation_owns_read_only_whole_numbers():
    given_kept = np.array([1, 2])
    allocation = Allocation(given_kept)
    given_kept[0] = 9
    assert allocation.kept.tolist() == [1, 2] and allocation.kept.dtype == np.int64
    with pytest.raises(ValueError, match="read-only"):
        allocation.kept[0] = 1


@pytest.mark.parametrize("keep", [np.zeros(3), np.zeros(5), np.zeros(0)])
def test_a_policy_of_another_model_is_refused(keep):
    with refuses(InputError):
        allocate(Policy(keep), Budget(10), layout())


@pytest.mark.parametrize("remove", [-1, layout().prunable])
def test_a_budget_that_cannot_be_met_is_refused(remove):
    with refuses(InputError):
        allocate(Policy.uniform(layout()), Budget(remove), layout())


def test_the_floors_of_a_site_are_kept():
    of = layout(groups=4)
    of = replace(of, sites=tuple(replace(site, floor=3) if site.kind == "attn" else site for site in of.sites))
    kept = allocate(Policy(np.array([-9.0, 9, -9, 9])), budget_of(of, 1, 0.9), of).kept
    assert kept[::2].tolist() == [3, 3]
