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
    leant,
    plain_process,
    planted_lean,
    probes,
    sample,
    spread,
    truth,
)
from ppf.errors import InputError
from ppf.learn import fit_predictor as module
from ppf.learn.fit_predictor import FITS, Facts, fit_curves, fit_link, fit_predictor
from ppf.learn.metrics import figures
from ppf.learn.predictor import LEAN_NOISE, Additive, read_link
from ppf.learn.process import NOISE, Points
from ppf.samples import kept_matrix

PROBES = len(probes(truth()))


@pytest.fixture
def short(monkeypatch):
    """Networks that are hardly trained: enough where only their form counts."""
    monkeypatch.setattr(module, "_CNN_STEPS", 20)


def fitted(kind, of, count=40, seed=0):
    return fit_predictor(kind, probes(of) + spread(of, count, 1), [], LAYOUT, DENSE_LOG_PPL, seed)


def facts(of, kept, lean=0.3):
    """Of allocations whose damage is known; all lean alike."""
    return Facts(curves_of(of), kept, of(kept), np.full(len(kept), lean), 0)


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


# --- additive ---


def test_the_sum_knows_how_far_off_it_is():
    of, kept = truth(), allocations(400, 0.4, 0)
    predictor = fitted("additive", of, 100)
    damage, std = predictor.estimator.estimate(kept)
    missed = np.log((of(kept) + NOISE) / (damage + NOISE))
    assert (std / (damage + NOISE)) == pytest.approx(float(predictor.estimator.spread))
    assert np.sqrt((missed**2).mean()) == pytest.approx(float(predictor.estimator.spread), rel=0.25)


# --- corrected ---


def process_facts(samples, curves, link):
    """The points of both processes and their targets, the dense model in front."""
    seen = Points.of(np.concatenate([LAYOUT.units[None], kept_matrix(samples, LAYOUT)]), curves)
    correction = np.log([NOISE, *(one.kl + NOISE for one in samples)]) - seen.sizes
    rises = [(one.log_ppl - DENSE_LOG_PPL + LEAN_NOISE) / (read_link(link, one.kl) + LEAN_NOISE) for one in samples]
    return seen, correction, np.log([1.0, *rises])


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_both_processes_answer_as_plain_ones_do(strength):
    of, kept = truth(0, strength), np.concatenate([allocations(20, ratio, 7) for ratio in (0.05, 0.3, 0.7)])
    samples = leant(spread(of, 20, 1))
    predictor = fit_predictor("corrected", leant(probes(of)) + samples, [], LAYOUT, DENSE_LOG_PPL, 0)
    estimator = predictor.estimator
    (seen, correction, leaning), new = process_facts(samples, estimator.curves, predictor.link), Points.of(kept, estimator.curves)
    mean, std = plain_process(estimator.correction.hyper, estimator.correction.scales, seen, correction, new)
    damage, damage_std = estimator.estimate(kept)
    np.testing.assert_allclose(damage, np.exp(mean + new.sizes) - NOISE, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(damage_std, np.exp(mean + new.sizes) * std, rtol=1e-3)
    lean, _ = plain_process(estimator.leaning.hyper, estimator.leaning.scales, seen, leaning, new)
    np.testing.assert_allclose(estimator.lean(kept), lean, rtol=1e-5, atol=1e-7)


def test_places_count_in_the_correction_alone():
    estimator = fitted("corrected", truth()).estimator
    assert estimator.correction.hyper[4] > 0 and estimator.leaning.hyper[4] == 0


def test_the_process_never_believes_that_nothing_is_noise():
    hyper = fitted("corrected", truth(0, strength=0.0)).estimator.correction.hyper
    assert 0.999e-3 < hyper[:-1].min() < 0.01 and hyper[:-1].max() < 100.1


@pytest.mark.parametrize("seed", range(3))
def test_without_interaction_the_correction_is_none(seed):
    of, kept = truth(seed, strength=0.0), allocations(50, 0.4, 2)
    corrected, plain = (fitted(kind, of).predict(kept) for kind in ("corrected", "additive"))
    np.testing.assert_allclose(corrected.damage, plain.damage, rtol=0.01)
    np.testing.assert_allclose(corrected.damage, of(kept), rtol=0.02)


@pytest.mark.parametrize("seed", range(3))
def test_with_interaction_the_correction_ranks_and_predicts_better_than_the_sum(seed):
    of = truth(seed)
    unseen = spread(of, 40, 2, "heldout")
    corrected, plain = (figures(fitted(kind, of), unseen, LAYOUT, DENSE_LOG_PPL) for kind in ("corrected", "additive"))
    for ratio, tau in corrected.tau_within.items():
        assert tau > max(0.9, plain.tau_within[ratio] + 0.15)
    assert corrected.mae_damage < plain.mae_damage / 10 and corrected.mse < plain.mse / 10
    assert 0.5 < corrected.z < 1.6


def test_more_samples_make_the_process_better():
    of = truth()
    unseen = spread(of, 40, 2, "heldout")
    few, many = (figures(fitted("corrected", of, count), unseen, LAYOUT, DENSE_LOG_PPL) for count in (10, 80))
    assert many.mae_damage < few.mae_damage / 2 and many.tau_mean > few.tau_mean


def test_the_process_is_less_sure_away_from_what_it_saw():
    of = truth()
    estimator = fitted("corrected", of).estimator
    alone = LAYOUT.units - np.diag(LAYOUT.units - LAYOUT.floors)
    spreads = []
    for kept in (kept_matrix(spread(of, 40, 1), LAYOUT), kept_matrix(spread(of, 40, 2), LAYOUT), alone):
        damage, std = estimator.estimate(kept)
        spreads.append(np.median(std / (damage + NOISE)))
    assert spreads[0] < spreads[1] / 2 and spreads[1] < spreads[2] / 2


def test_only_the_newest_samples_fit_into_the_process(monkeypatch):
    of, kept = truth(), allocations(20, 0.4, 5)
    newest = spread(of, 10, 3)
    alone = FITS["corrected"](facts(of, kept_matrix(newest, LAYOUT)))
    monkeypatch.setattr(module, "_MOST_POINTS", 30)
    both = kept_matrix(spread(of, 10, 1) + newest, LAYOUT)
    found = FITS["corrected"](facts(of, both))
    np.testing.assert_array_equal(found.estimate(kept), alone.estimate(kept))
    np.testing.assert_array_equal(found.lean(kept), alone.lean(kept))


# --- leaning off the link ---


def fitted_leant(of, kind="corrected", count=40):
    return fit_predictor(kind, leant(probes(of) + spread(of, count, 1)), [], LAYOUT, DENSE_LOG_PPL, 0)


def log_missed(found, samples):
    """Float[N]: log-perplexity measured over found, both with the noise on top, as a logarithm."""
    rises = np.array([one.log_ppl for one in samples]) - DENSE_LOG_PPL
    return np.log((rises + LEAN_NOISE) / (found + LEAN_NOISE))


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_lean_is_learned_better_than_with_the_link_alone(seed):
    of = truth(seed)
    predictor, unseen = fitted_leant(of), leant(spread(of, 40, 2, "heldout"))
    kept, damage = kept_matrix(unseen, LAYOUT), np.array([one.kl for one in unseen])
    with_lean, alone = (
        np.abs(log_missed(found, unseen)).mean() for found in (predictor.leant(kept, damage), predictor.log_ppl_of(damage))
    )
    assert with_lean < alone / 2
    found = predictor.predict(kept)
    with_lean, alone = (
        np.abs(log_missed(log_ppl, unseen)).mean() for log_ppl in (found.log_ppl, predictor.log_ppl_of(found.damage))
    )
    assert with_lean < alone / 2
    assert np.corrcoef(predictor.estimator.lean(kept), planted_lean(kept))[0, 1] > 0.85


def test_the_lean_changes_no_damage():
    of, kept = truth(), allocations(20, 0.4, 5)
    np.testing.assert_array_equal(fitted_leant(of).estimator.estimate(kept), fitted("corrected", of).estimator.estimate(kept))


def test_where_nothing_leans_none_is_found():
    estimator = fitted("corrected", truth()).estimator
    assert np.abs(estimator.lean(allocations(50, 0.4, 2))).max() < 0.02


def test_the_scatter_is_what_samples_that_were_not_seen_show():
    of = truth()
    predictor, unseen = fitted_leant(of), leant(spread(of, 40, 2, "heldout"))
    damage = np.array([one.kl for one in unseen])
    missed = log_missed(predictor.leant(kept_matrix(unseen, LAYOUT), damage), unseen)
    assert float(predictor.scatter) == pytest.approx(np.sqrt((missed**2).mean()), rel=0.5)


def test_without_a_process_the_scatter_is_that_around_the_link():
    samples = leant(spread(truth(), 40, 1))
    predictor = fitted_leant(truth(), "additive")
    missed = log_missed(predictor.log_ppl_of(np.array([one.kl for one in samples])), samples)
    assert float(predictor.scatter) == pytest.approx(np.sqrt((missed**2).mean()))
    assert float(fit_predictor("additive", probes(truth()), [], LAYOUT, DENSE_LOG_PPL, 0).scatter) == 1


def test_the_doubt_about_log_perplexity_is_calibrated():
    of = truth()
    predictor, unseen = fitted_leant(of), leant(spread(of, 40, 2, "heldout"))
    found = predictor.predict(kept_matrix(unseen, LAYOUT))
    missed = (np.array([one.log_ppl for one in unseen]) - DENSE_LOG_PPL - found.log_ppl) / found.log_ppl_std
    assert 0.5 < np.sqrt((missed**2).mean()) < 1.6


@pytest.mark.parametrize("kind", FITS)
def test_samples_that_do_better_than_the_dense_model_break_no_fit(kind, short):
    lucky = [replace(one, log_ppl=DENSE_LOG_PPL - 0.5, kl=-1e-4) for one in spread(truth(), 3, 5)]
    predictor = fit_predictor(kind, probes(truth()) + spread(truth(), 10) + lucky, [], LAYOUT, DENSE_LOG_PPL, 0)
    found = predictor.predict(allocations(10, 0.4, 0))
    for values in (found.damage, found.std, found.log_ppl, found.log_ppl_std):
        assert np.isfinite(values).all() and (values >= 0).all()


# --- cnn ---


def test_the_network_learns(monkeypatch):
    monkeypatch.setattr(module, "_CNN_STEPS", 300)
    of = truth(2, strength=0.0)
    predictor, unseen = fitted("cnn", of, 60), spread(of, 40, 2, "heldout")
    found = figures(predictor, unseen, LAYOUT, DENSE_LOG_PPL)
    damage = np.array([one.kl for one in unseen])
    assert found.mae_damage < np.abs(damage - np.median(damage)).mean() / 4
    assert min(found.tau_within.values()) > 0.7 and found.tau > 0.85
    assert 0.4 < found.z < 2


def test_the_network_answers_as_its_training_twin_does(short):
    kept = allocations(30, 0.4, 0)
    estimator = fitted("cnn", truth()).estimator
    matrices = torch.from_numpy(np.clip(kept[..., None] / LAYOUT.units[:, None] * 8 - np.arange(8), 0, 1)).float() - 0.5
    columns = torch.nn.functional.unfold(matrices[:, None], 3, padding=1, stride=(1, 2)).transpose(1, 2)
    members = []
    for index in range(len(estimator.last)):
        twin = module._Network(columns.shape[1], torch.Generator())
        names = [name for name, _ in twin.named_parameters()]
        twin.load_state_dict({name: torch.from_numpy(np.asarray(getattr(estimator, name)[index])) for name in names})
        members.append(twin(columns).detach().numpy())
    mean, std, error = estimator.scale
    answers = np.array(members) * std + mean
    total = np.exp(answers.mean(0))
    damage, spread_of = estimator.estimate(kept)
    np.testing.assert_allclose(damage, np.maximum(total - NOISE, 0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(spread_of, total * np.sqrt(answers.var(0) + error**2), rtol=1e-4)


def test_the_members_of_the_ensemble_differ(short):
    estimator = fitted("cnn", truth()).estimator
    assert len(estimator.last) == 3
    for name in ("kernel", "hidden", "last"):
        parameters = getattr(estimator, name)
        assert (parameters[0] != parameters[1]).mean() > 0.9 and (parameters[1] != parameters[2]).mean() > 0.9


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
