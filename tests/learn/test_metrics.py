from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from builders import examples
from learn_builders import DENSE_LOG_PPL, LAYOUT, curves_of, spread, truth
from ppf.learn.metrics import figures, tau
from ppf.learn.predictor import Additive, Predictor

PLAIN = truth(strength=0.0)
LINK = np.array([[0.0, 1.0], [0.0, 0.8]])  # as the samples are made


@dataclass
class Given:
    """An estimator that says what it was told, whatever it is asked."""

    damage: np.ndarray
    std: np.ndarray
    kind = "given"

    def estimate(self, kept):
        return self.damage, self.std

    def lean(self, kept):
        return np.zeros(len(kept))


def judged(damage, samples, std=1.0):
    damage = np.asarray(damage, dtype=float)
    return figures(Predictor(Given(damage, np.full(len(damage), std)), LINK, np.zeros(())), samples, LAYOUT, DENSE_LOG_PPL)


def damages(samples):
    return np.array([one.kl for one in samples])


def tau_b(first, second):
    """By its definition, pair by pair."""
    pairs = [
        (a - c, b - d)
        for i, (a, b) in enumerate(zip(first, second, strict=True))
        for c, d in list(zip(first, second, strict=True))[:i]
    ]
    score = sum(np.sign(a) * np.sign(b) for a, b in pairs)
    return score / np.sqrt(sum(a != 0 for a, _ in pairs) * sum(b != 0 for _, b in pairs))


@examples(100)
@given(st.lists(st.tuples(st.integers(-4, 4), st.integers(-4, 4)), min_size=2, max_size=25))
def test_tau_is_counted_over_all_pairs(pairs):
    first, second = np.array(pairs, dtype=float).T
    assume(np.ptp(first) and np.ptp(second))
    assert tau(first, second) == pytest.approx(tau_b(first, second))
    assert tau(-first, second) == pytest.approx(-tau(first, second))
    assert tau(np.exp(first), 3 * second) == pytest.approx(tau(first, second))


def test_tau_of_a_constant_is_nothing():
    assert tau(np.ones(5), np.arange(5.0)) == tau(np.arange(5.0), np.ones(5)) == tau(np.ones(5), np.ones(5)) == 0


def test_a_perfect_predictor_makes_no_error():
    curves = curves_of(PLAIN)
    predictor = Predictor(Additive(curves.units, curves.table, np.array(0.1)), LINK, np.zeros(()))
    found = figures(predictor, spread(PLAIN, 10), LAYOUT, DENSE_LOG_PPL)
    assert found.count == 30 and found.tau == pytest.approx(1) and found.tau_mean == pytest.approx(1)
    for within in (found.tau_within, found.tau_log_ppl_within):
        assert within == pytest.approx({"0.2": 1, "0.35": 1, "0.5": 1})
    assert max(found.mse, found.mae, found.mae_damage, found.z) < 1e-9


def test_a_predictor_that_is_sure_and_right_is_no_division_by_zero():
    samples = spread(PLAIN, 5)
    assert judged(damages(samples), samples, std=0.0).z == 0


def test_errors_are_means_over_the_samples():
    samples = [replace(spread(PLAIN, 1)[0], kl=kl, log_ppl=DENSE_LOG_PPL + rise) for kl, rise in ((1.0, 1.0), (2.0, 1.0))]
    found = judged([1.5, 1.0], samples, std=0.5)
    assert found.mae_damage == pytest.approx((0.5 + 1.0) / 2)
    assert found.mae == pytest.approx((0.2 + 0.2) / 2)
    assert found.mse == pytest.approx(((np.exp(-1.2) - np.exp(-1)) ** 2 + (np.exp(-0.8) - np.exp(-1)) ** 2) / 2)
    assert found.z == pytest.approx(np.sqrt((1.0**2 + 2.0**2) / 2))


def test_knowing_the_ratio_alone_is_worth_nothing_within_a_ratio():
    samples = spread(PLAIN, 20)
    found = judged([one.ratio for one in samples], samples)
    assert found.tau > 0.6 and set(found.tau_within.values()) == {0.0} and found.tau_mean == 0


def test_each_ratio_is_judged_by_itself():
    samples = spread(PLAIN, 12)
    sign = {0.2: 1, 0.35: -1, 0.5: 1}
    found = judged([10 + sign[one.ratio] * one.kl for one in samples], samples)
    assert found.tau_within == pytest.approx({"0.2": 1, "0.35": -1, "0.5": 1}) and found.tau_mean == pytest.approx(1 / 3)


def test_damage_and_log_perplexity_are_two_truths():
    samples = [replace(one, log_ppl=9 - one.log_ppl) for one in spread(PLAIN, 8)]
    found = judged(damages(samples), samples)
    assert found.tau == pytest.approx(1) and found.tau_within == pytest.approx({"0.2": 1, "0.35": 1, "0.5": 1})
    assert found.tau_log_ppl_within == pytest.approx({"0.2": -1, "0.35": -1, "0.5": -1})


def test_a_ratio_with_one_sample_has_no_order():
    samples = [*spread(PLAIN, 6, ratios=(0.2,)), *spread(PLAIN, 1, ratios=(0.4,))]
    assert judged(damages(samples), samples).tau_within == pytest.approx({"0.2": 1})
    alone = spread(PLAIN, 1, ratios=(0.1, 0.2, 0.3))
    assert judged(damages(alone), alone).tau_within == {} and judged(damages(alone), alone).tau_mean == 0
