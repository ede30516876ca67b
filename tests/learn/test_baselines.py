from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import LAYOUTS, examples, layout
from learn_builders import LAYOUT, allocations, curves_of, truth
from ppf.learn.baselines import knapsack
from ppf.learn.features import Curves

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
