import numpy as np
import pytest

from learn_builders import (
    DENSE_LOG_PPL,
    LAYOUT,
    allocations,
    facts,
    fitted,
    leant,
    plain_process,
    planted_lean,
    probes,
    spread,
    truth,
)
from ppf.learn import fit_predictor as module
from ppf.learn.fit_predictor import FITS, fit_predictor
from ppf.learn.metrics import figures
from ppf.learn.predictor import LEAN_NOISE, read_link
from ppf.learn.process import NOISE, Points
from ppf.samples import kept_matrix


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
