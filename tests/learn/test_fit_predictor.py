from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from builders import examples, refuses
from learn_builders import (
    DENSE_LOG_PPL,
    LAYOUT,
    allocations,
    curves_of,
    facts,
    fitted,
    probes,
    sample,
    spread,
    truth,
)
from ppf.errors import InputError
from ppf.learn.fit_predictor import FITS, fit_curves, fit_link, fit_predictor
from ppf.learn.predictor import Additive
from ppf.learn.process import NOISE

PROBES = len(probes(truth()))


def failed(sample):
    return replace(sample, status="failed", reason="out of memory", kl=0.0, log_ppl=0.0)


# --- curves ---


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [(0.0,), (0.5, 0.0), (0.9, 0.75, 0.5, 0.25, 0.0)])
def test_curves_pass_through_their_probes_and_rise_from_zero(seed, levels):
    of = truth(seed)
    measured = probes(of, levels)
    curves = fit_curves(measured, [], LAYOUT)
    for one in measured:
        assert curves.damages(np.array(one.kept)).sum() == pytest.approx(one.kl, rel=1e-9)
    for index, site in enumerate(LAYOUT.sites):
        curve = curves.site(index)
        assert curve[-1] == 0 and (np.diff(curve) <= 1e-9).all()
        assert (curve[: site.floor] == curve[site.floor]).all()


def test_five_probes_a_site_tell_the_whole_curve():
    of = truth()
    found, true = fit_curves(probes(of), [], LAYOUT), curves_of(of)
    for index, site in enumerate(LAYOUT.sites):
        np.testing.assert_allclose(found.site(index)[site.floor :], true.site(index)[site.floor :], atol=0.01 * of.weights[index])


def test_the_order_of_probes_and_other_samples_change_no_curve():
    of = truth()
    one, other = (fit_curves(measured, [], LAYOUT) for measured in (probes(of), [*spread(of, 3), *probes(of)[::-1]]))
    np.testing.assert_array_equal(one.table, other.table)


@examples(30)
@given(st.lists(st.floats(-0.1, 5), min_size=PROBES, max_size=PROBES))
def test_curves_of_noisy_probes_never_fall_with_what_is_removed(damages):
    noisy = [replace(one, kl=kl) for one, kl in zip(probes(truth()), damages, strict=True)]
    curves = fit_curves(noisy, [], LAYOUT)
    for index in range(len(LAYOUT.sites)):
        assert curves.site(index)[-1] == 0 and (np.diff(curves.site(index)) <= 1e-9).all()
    for one in noisy:
        assert curves.damages(np.array(one.kept)).sum() >= max(one.kl, 0) - 1e-9


def test_a_failed_probe_counts_as_the_worst_of_all():
    measured = probes(truth())
    worst = max(one.kl for one in measured[3:])
    curves = fit_curves(measured[3:], [failed(one) for one in measured[:3]], LAYOUT)
    for one in measured[:3]:
        assert curves.damages(np.array(one.kept)).sum() == pytest.approx(worst)


def test_a_site_without_a_probe_is_refused():
    measured = probes(truth())
    label = LAYOUT.sites[2].label
    without = [one for one in measured if one.kept[2] == LAYOUT.units[2]]
    with refuses(InputError) as caught:
        fit_curves(without, [], LAYOUT)
    assert label in str(caught.value)


def test_a_site_that_cannot_shrink_needs_no_probe():
    fixed = replace(LAYOUT, sites=(replace(LAYOUT.sites[0], floor=LAYOUT.units[0]), *LAYOUT.sites[1:]))
    measured = [one for one in probes(truth()) if one.kept[0] == LAYOUT.units[0]]
    assert not fit_curves(measured, [], fixed).site(0).any()


def test_probes_that_all_failed_are_refused():
    with refuses(InputError) as caught:
        fit_curves(spread(truth(), 3), [failed(one) for one in probes(truth())], LAYOUT)
    assert "out of memory" in str(caught.value)


# --- the link to log-perplexity ---


def linked(damages, rises):
    one = sample(truth(), LAYOUT.units)
    return fit_link(
        [replace(one, kl=kl, log_ppl=DENSE_LOG_PPL + rise) for kl, rise in zip(damages, rises, strict=True)], DENSE_LOG_PPL
    )


@examples(50)
@given(st.lists(st.tuples(st.sampled_from([-0.01, 0.0, 0.5, 2.0]) | st.floats(0, 9), st.floats(-1, 9)), min_size=1, max_size=40))
def test_the_link_starts_at_nothing_and_never_falls(pairs):
    link = linked(*zip(*pairs, strict=True))
    assert (link[:, 0] == 0).all()
    assert (np.diff(link[0]) > 0).all() and (np.diff(link[1]) >= 0).all()


def test_the_link_follows_the_samples():
    rng = np.random.default_rng(0)
    damage = rng.uniform(0, 5, 300)
    link = linked(damage, np.sqrt(damage) + rng.normal(0, 0.05, 300))
    np.testing.assert_allclose(link[1, 1:], np.sqrt(link[0, 1:]), atol=0.1)


# --- all kinds ---


@pytest.mark.parametrize("kind", FITS)
def test_a_fit_is_decided_by_its_seed_alone(kind, short):
    of, kept = truth(), allocations(10, 0.4, 3)
    one, again, other = (fitted(kind, of, seed=seed).predict(kept) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.damage, again.damage)
    np.testing.assert_array_equal(one.std, again.std)
    assert (one.damage != other.damage).any() == (kind == "cnn")


@pytest.mark.parametrize("kind", FITS)
def test_a_fit_leaves_global_randomness_alone(kind, short):
    before = torch.get_rng_state(), np.random.get_state()
    fitted(kind, truth(), 10)
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1][1])
    assert np.random.get_state()[2] == before[1][2]


@pytest.mark.parametrize("kind", FITS)
def test_a_model_that_nothing_damages_has_no_damage(kind, short):
    harmless = [replace(one, kl=0.0, log_ppl=DENSE_LOG_PPL) for one in probes(truth()) + spread(truth(), 10)]
    prediction = fit_predictor(kind, harmless, [], LAYOUT, DENSE_LOG_PPL, 0).predict(allocations(5, 0.4, 0))
    np.testing.assert_allclose(prediction.damage, 0, atol=1e-6)
    np.testing.assert_allclose(prediction.log_ppl, 0, atol=1e-6)


@pytest.mark.parametrize("kind", ["corrected", "cnn"])
def test_too_few_samples_give_the_plain_sum(kind):
    of, kept = truth(), allocations(7, 0.3, 0)
    for count in (0, 1, 7):
        estimator = FITS[kind](facts(of, kept[:count]))
        assert isinstance(estimator, Additive)
        damage, std = estimator.estimate(kept)
        np.testing.assert_allclose(damage, of.single(kept).sum(1))
        assert (std > 0).all()


@pytest.mark.parametrize("kind", FITS)
def test_samples_that_do_better_than_the_dense_model_break_no_fit(kind, short):
    lucky = [replace(one, log_ppl=DENSE_LOG_PPL - 0.5, kl=-1e-4) for one in spread(truth(), 3, 5)]
    predictor = fit_predictor(kind, probes(truth()) + spread(truth(), 10) + lucky, [], LAYOUT, DENSE_LOG_PPL, 0)
    found = predictor.predict(allocations(10, 0.4, 0))
    for values in (found.damage, found.std, found.log_ppl, found.log_ppl_std):
        assert np.isfinite(values).all() and (values >= 0).all()


@pytest.mark.parametrize(("kind", "probed"), [("corrected", False), ("additive", False), ("cnn", True)])
def test_probes_are_samples_for_the_network_alone(kind, probed, monkeypatch):
    seen = []

    def fit(given):
        seen.extend(given.kept)
        assert len(given.damage) == len(given.lean) == len(given.kept)
        return Additive(given.curves.units, given.curves.table, np.ones(()))

    monkeypatch.setitem(FITS, kind, fit)
    fitted(kind, truth(), 10)
    assert len(seen) == 30 + probed * PROBES


# --- additive ---


def test_the_sum_knows_how_far_off_it_is():
    of, kept = truth(), allocations(400, 0.4, 0)
    predictor = fitted("additive", of, 100)
    damage, std = predictor.estimator.estimate(kept)
    missed = np.log((of(kept) + NOISE) / (damage + NOISE))
    assert (std / (damage + NOISE)) == pytest.approx(float(predictor.estimator.spread))
    assert np.sqrt((missed**2).mean()) == pytest.approx(float(predictor.estimator.spread), rel=0.25)
