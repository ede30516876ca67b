from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import LAYOUTS, examples, layout, refuses
from learn_builders import LAYOUT, allocations, curves_of, truth
from ppf.errors import DamagedError
from ppf.learn.baselines import HEURISTICS, global_ranking, knapsack
from ppf.learn.features import Curves
from ppf.space.allocation import allocate
from ppf.space.budget import Budget
from ppf.space.importance import Importance
from ppf.space.policy import Policy
from ppf.space.statistics import Statistics

SMALL = layout(layers=2, heads=2, groups=2, head_dim=4, hidden=16, ffn=4)
EXACT = SMALL.prunable // int(np.gcd.reduce(SMALL.costs))
"""So many budget steps that every cost is a whole number of them."""
ALL = np.array(list(product(*(range(floor, units + 1) for floor, units in zip(SMALL.floors, SMALL.units, strict=True)))))


def kept_of(rows, of):
    """Int[B + 1, S]; every row is whole units."""
    kept = rows * of.units
    np.testing.assert_allclose(kept, np.rint(kept), atol=1e-9)
    return np.rint(kept).astype(int)


def removed(kept, of):
    return (of.units - kept) @ of.costs


def random_curves(seed, of, steps=9.0):
    """Falling to zero at full, otherwise arbitrary, with ties."""
    rng = np.random.default_rng(seed)
    sites = [np.sort(np.append(rng.integers(0, steps, units) / 3, 0.0))[::-1] for units in of.units]
    return Curves(np.array(of.units), np.concatenate(sites))


@examples(40)
@given(st.integers(0, 2**32 - 1))
def test_every_row_is_the_best_of_all_allocations(seed):
    curves = random_curves(seed, SMALL)
    kept = kept_of(knapsack(curves, SMALL, EXACT), SMALL)
    damages, gone = curves.damages(ALL).sum(1), removed(ALL, SMALL)
    for row, budget in zip(kept, np.arange(EXACT + 1) * SMALL.prunable // EXACT, strict=True):
        if budget > gone.max():
            break
        assert removed(row, SMALL) >= budget
        assert curves.damages(row).sum() == pytest.approx(damages[gone >= budget].min())


@pytest.mark.parametrize("bins", [7, 50, 1000])
@pytest.mark.parametrize("of", [SMALL, LAYOUT, LAYOUTS["tiny"], layout(layers=6, heads=8, groups=2, ffn=300)])
def test_rows_keep_floors_meet_budgets_and_cost_ever_more(of, bins):
    curves = curves_of(truth(of=of))
    kept = kept_of(knapsack(curves, of, bins), of)
    assert (kept >= of.floors).all() and (kept <= of.units).all() and (kept[0] == of.units).all()
    damage, gone = curves.damages(kept).sum(1), removed(kept, of)
    assert (np.diff(damage) >= -1e-9).all()
    met = gone >= np.arange(bins + 1) / bins * of.prunable - 1e-6
    first = int(np.argmin(met)) if not met.all() else bins + 1
    assert met[:first].all() and (kept[first:] == kept[first - 1]).all()
    most = removed(of.floors, of)
    assert first - 1 >= (most / of.prunable) * bins - len(of.sites) - 1


def test_no_scattered_allocation_is_better():
    curves = curves_of(truth())
    kept = kept_of(knapsack(curves, LAYOUT), LAYOUT)
    for ratio in (0.1, 0.3, 0.5, 0.7):
        others = np.concatenate([allocations(300, ratio, 0, scale) for scale in (0.03, 0.1, 0.3)])
        assert curves.damages(kept[round(1000 * ratio)]).sum() <= 1.01 * curves.damages(others).sum(1).min()


def test_equal_sites_are_treated_alike():
    of = layout(layers=3, heads=1, groups=1, ffn=40)
    curve = np.linspace(1, 0, 41) ** 2
    curves = Curves(np.array(of.units), np.concatenate([np.array([9.0, 0.0]), curve] * 3))
    kept = kept_of(knapsack(curves, of, of.prunable // int(np.gcd.reduce(of.costs))), of)
    assert (kept[:, ::2] == 1).all() and np.ptp(kept[:, 1::2], axis=1).max() <= 1


def test_floors_of_sites_are_kept():
    of = replace(LAYOUT, sites=tuple(replace(site, floor=site.units // 2) for site in LAYOUT.sites))
    kept = kept_of(knapsack(curves_of(truth()), of), of)
    assert (kept >= of.units // 2).all() and (kept[-1] == of.units // 2).all()


# --- the heuristics ---

every = pytest.mark.parametrize("name", HEURISTICS)
MODELS = {**LAYOUTS, "learn": LAYOUT, "one group": layout(3, 2, 1, 8, 32, 60)}
RATIOS = (0.0, 0.05, 0.3, 0.5, 0.8)


def statistics(of, seed=0, **changes):
    """Random ones; both sites of a layer share what belongs to the layer."""
    rng = np.random.default_rng(seed)
    layers = np.array([site.layer for site in of.sites])
    variance = tuple(rng.lognormal(0, 1.5, units) for units in of.units)
    made = {
        "outliers": rng.random(of.layers)[layers], "alpha": rng.uniform(2, 6, of.layers)[layers],
        "influence": rng.permutation(len(of.sites)) / 7, "spread": np.array([site.std() + 0.1 for site in variance]),
        "variance": variance,
    }  # fmt: skip
    return Statistics(**{**made, **changes})


def scores(of, seed=0):
    """Importance without ties."""
    rng = np.random.default_rng(seed)
    return Importance(tuple(rng.lognormal(0, 1.5, units) for units in of.units), "random", "x")


def constant(of):
    """A model whose sites and units are all alike."""
    sites, ones = np.ones(len(of.sites)), tuple(np.full(units, 0.1) for units in of.units)
    return Statistics(0.3 * sites, 0.3 * sites, 0.3 * sites, 1e-17 * sites, ones), Importance(ones, "x", "y")


def policy(name, of, ratio=0.3, seed=0, **changes):
    return HEURISTICS[name](statistics(of, seed, **changes), scores(of, seed), of, ratio).keep


def kept(name, of, ratio=0.3, seed=0, **changes):
    return allocate(Policy(policy(name, of, ratio, seed, **changes)), Budget.from_ratio(ratio, of), of).kept


@every
@pytest.mark.parametrize("model", MODELS)
def test_every_budget_is_met_to_the_channel_and_floors_are_kept(name, model):
    of = MODELS[model]
    most = removed(of.floors, of) / of.prunable
    for seed, ratio in enumerate([ratio for ratio in RATIOS if ratio < most] + [np.floor(most * 1e6) / 1e6]):
        units, budget = kept(name, of, ratio, seed), Budget.from_ratio(ratio, of)
        assert (units >= of.floors).all() and (units <= of.units).all()
        assert 0 <= removed(units, of) - budget.remove < of.costs.min()


@every
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.55])
def test_equal_sites_and_units_are_pruned_alike(name, model, ratio):
    of = MODELS[model]
    policy, budget = HEURISTICS[name](*constant(of), of, ratio), Budget.from_ratio(ratio, of)
    even, found = (allocate(one, budget, of).kept for one in (Policy.uniform(of), policy))
    if name in ("flap", "global_ranking"):  # of equal KV groups that do not all fit, some go
        assert (np.abs(found - even) * of.costs <= of.costs.max()).all()
        assert all(np.ptp(found[kind::2]) <= 1 for kind in (0, 1))
    else:
        assert np.array_equal(found, even)


@every
def test_a_heuristic_reads_only_its_own_statistic(name):
    of, reads = LAYOUT, {"owl": ["outliers"], "alpha_pruning": ["alpha"], "flap": ["variance", "spread"], "depth": ["influence"]}
    own, other = statistics(of), statistics(of, 1)
    mixed = replace(other, **{field: getattr(own, field) for field in reads.get(name, [])})
    one = HEURISTICS[name](own, scores(of), of, 0.3).keep
    same = HEURISTICS[name](mixed, scores(of, int(name != "global_ranking")), of, 0.3).keep
    assert np.array_equal(one, same)
    new = HEURISTICS[name](other, scores(of, 1), of, 0.3).keep
    assert np.array_equal(one, new) is (name == "uniform")


@every
def test_layers_that_change_places_take_their_wishes_along(name):
    of, given, ranked = LAYOUT, statistics(LAYOUT), scores(LAYOUT)
    order = (2 * np.array([2, 0, 3, 1])[:, None] + [0, 1]).ravel()
    moved = Statistics(
        given.outliers[order], given.alpha[order], given.influence[order], given.spread[order],
        tuple(given.variance[site] for site in order),
    )  # fmt: skip
    shuffled = Importance(tuple(ranked.scores[site] for site in order), "x", "y")
    np.testing.assert_allclose(
        HEURISTICS[name](moved, shuffled, of, 0.4).keep, HEURISTICS[name](given, ranked, of, 0.4).keep[order]
    )


@pytest.mark.parametrize(("name", "field"), [("owl", "outliers"), ("alpha_pruning", "alpha"), ("depth", "influence")])
def test_only_where_a_site_stands_between_the_extremes_counts(name, field):
    values = getattr(statistics(LAYOUT), field)
    np.testing.assert_allclose(policy(name, LAYOUT, **{field: 7 * values - 2}), policy(name, LAYOUT))


@examples(30)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["owl", "alpha_pruning", "depth"]), st.sampled_from(sorted(MODELS)))
def test_wishes_follow_the_statistic(seed, name, model):
    of = MODELS[model]
    given = statistics(of, seed)
    sign, field = {"owl": (1, "outliers"), "alpha_pruning": (-1, "alpha"), "depth": (1, "influence")}[name]
    order = np.argsort(sign * getattr(given, field), kind="stable")
    wishes = policy(name, of, 0.4, seed)[order]
    steps = np.diff((sign * getattr(given, field))[order])
    assert (np.diff(wishes)[steps > 0] > 0).all() and (np.diff(wishes)[steps == 0] == 0).all()
    share = (kept(name, of, 0.4, seed) / of.units)[order]
    for kind in ("attn", "ffn"):
        of_kind = [index for index, site in enumerate(order) if of.sites[site].kind == kind]
        own = of.units[order[of_kind[0]]]
        assert (np.diff(share[of_kind]) >= -1.001 / own).all()


@pytest.mark.parametrize("model", MODELS)
def test_owl_is_its_authors_formula(model):
    of = MODELS[model]
    outliers = statistics(of).outliers.tolist()
    raw = [(value - min(outliers)) * (1 / (max(outliers) - min(outliers)) * 0.08 * 2) for value in outliers]
    expected = [value - sum(raw) / len(raw) + (1 - 0.3) for value in raw]
    gap = policy("owl", of) - expected
    assert np.ptp(gap) < 1e-12 and np.ptp(policy("owl", of)) == pytest.approx(0.16)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("model", MODELS)
def test_alpha_pruning_is_its_authors_formula_and_meets_the_budget_by_itself(model, ratio):
    of = MODELS[model]
    alpha, sizes = statistics(of).alpha.tolist(), (of.units * of.costs).tolist()
    raw = [(value - min(alpha)) / (max(alpha) - min(alpha)) * (1.3 - 0.7) + 0.7 for value in alpha]
    scale = sum(sizes) * ratio / sum(size * value for size, value in zip(sizes, raw, strict=True))
    wishes = policy("alpha_pruning", of, ratio)
    np.testing.assert_allclose(1 - wishes, [value * scale for value in raw], atol=1e-12)
    assert (1 - wishes) @ sizes == pytest.approx(ratio * of.prunable)


def ranked(columns_scores, of, ratio):
    """Int[S]: units above one threshold, found by adding one after the other; floors first."""
    left = of.prunable - int(np.ceil(ratio * of.prunable - 1e-6))
    count = np.array(of.floors)
    left -= int(count @ of.costs)
    queue = [
        (-score, site)
        for site, units in enumerate(columns_scores)
        for score in sorted(units, reverse=True)[of.floors[site] :]
    ]  # fmt: skip
    for _, site in sorted(queue):
        left -= of.costs[site]
        if left < 0:
            break
        count[site] += 1
    return count


@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.3, 0.5, 0.65])
@pytest.mark.parametrize("model", ["tiny", "learn", "one group"])
def test_flap_and_its_kin_keep_what_lies_above_one_threshold(model, ratio):
    of = MODELS[model]
    given, importance = statistics(of), scores(of)
    flap = [
        [(value - np.mean(units, dtype=float)) / site.columns / spread for value in units.tolist()]
        for units, site, spread in zip(given.variance, of.sites, given.spread, strict=True)
    ]
    units = [units.astype(float) for units in importance.scores]
    standard = [((one - one.mean()) / one.std()).tolist() if len(one) > 1 else [0.0] for one in units]
    for name, reference in (("flap", flap), ("global_ranking", standard)):
        np.testing.assert_allclose(policy(name, of, ratio) * of.units, ranked(reference, of, ratio))


@pytest.mark.parametrize("model", ["tiny", "learn"])
def test_the_scale_of_a_site_does_not_move_the_threshold(model):
    of = MODELS[model]
    given, importance, rng = statistics(of), scores(of), np.random.default_rng(0)
    factor, shift = 2.0 ** rng.integers(-20, 20, len(of.sites)), rng.random(len(of.sites))
    variance = tuple(
        scale * (units.astype(float) + shift) for units, scale, shift in zip(given.variance, factor, shift, strict=True)
    )
    found = policy("flap", of, variance=variance, spread=factor * given.spread)
    np.testing.assert_allclose(found, policy("flap", of))
    scaled = Importance(tuple(scale * units for units, scale in zip(importance.scores, factor, strict=True)), "x", "y")
    assert np.array_equal(global_ranking(given, scaled, of, 0.3).keep, global_ranking(given, importance, of, 0.3).keep)


@pytest.mark.parametrize("name", ["flap", "global_ranking"])
def test_a_higher_ratio_keeps_a_subset(name):
    rows = np.array([policy(name, LAYOUTS["llama-3-8b"], ratio) for ratio in np.linspace(0, 0.95, 12)])
    assert (np.diff(rows, axis=0) <= 0).all() and (rows[0] == 1).all() and len(np.unique(rows[6])) > 10


def test_a_site_with_a_long_tail_of_weak_units_loses_most():
    variance = [np.ones(units) + np.arange(units) / units for units in LAYOUT.units]
    variance[3][:40] -= 0.9 * variance[3][:40]
    spread = np.array([np.std(units) for units in variance])
    spread[3] /= 10
    keep = policy("flap", LAYOUT, 0.2, variance=tuple(variance), spread=spread)
    assert keep.argmin() == 3


@pytest.mark.parametrize("name", ["flap", "global_ranking"])
def test_units_of_another_model_are_refused(name):
    other = layout(layers=4, heads=4, groups=4, ffn=49)
    with refuses(DamagedError):
        HEURISTICS[name](statistics(other), scores(other), LAYOUT, 0.3)


@pytest.mark.parametrize("ratio", [0.02, 0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("model", ["tiny", "learn", "llama-2-7b", "llama-3-8b"])
def test_depth_empties_one_sub_layer_after_the_other(model, ratio):
    of = MODELS[model]
    found, order = kept("depth", of, ratio), np.argsort(statistics(of).influence)
    left, expected = Budget.from_ratio(ratio, of).remove, np.array(of.units, dtype=float)
    for site in order:
        gone = min(left / of.costs[site], of.units[site] - of.floors[site])
        expected[site] -= gone
        left -= gone * of.costs[site]
    part = np.flatnonzero((expected > of.floors) & (expected < of.units))
    assert len(part) <= 1
    exact = np.setdiff1d(np.arange(len(of.sites)), part)
    attn = of.units < of.units.max()
    np.testing.assert_array_equal(found[exact][attn[exact]], expected[exact][attn[exact]])
    moved = np.abs(found - expected)[~attn].sum() * of.costs[~attn][0]
    assert moved <= of.costs[attn].max() + of.costs.min()  # what rounding a part of one KV group frees or takes


def test_sub_layers_of_equal_influence_go_together():
    influence = np.array([3.0, 1, 1, 2, 3, 2, 1, 3])
    assert policy("depth", LAYOUT, influence=influence).tolist() == [2, 0, 0, 1, 2, 1, 0, 2]
