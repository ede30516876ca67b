import pytest

from learn_builders import DENSE_LOG_PPL, LAYOUT, probes, spread, truth
from ppf.learn.fit_predictor import fit_predictor
from ppf.learn.learning_curve import learning_curve
from ppf.learn.metrics import figures

OF = truth()
SEEN, HELDOUT = probes(OF) + spread(OF, 20), spread(OF, 10, seed=7, purpose="heldout")


@pytest.fixture(scope="module")
def predictor():
    return fit_predictor("corrected", SEEN, [], LAYOUT, DENSE_LOG_PPL, 0)


def test_it_ends_at_the_error_of_the_whole_fit(predictor):
    known, found = learning_curve(predictor, HELDOUT, LAYOUT, DENSE_LOG_PPL), figures(predictor, HELDOUT, LAYOUT, DENSE_LOG_PPL)
    assert known[-1].samples == 60
    assert known[-1].mae_damage == pytest.approx(found.mae_damage) and known[-1].tau_mean == pytest.approx(found.tau_mean)


def test_samples_help(predictor):
    known = learning_curve(predictor, HELDOUT, LAYOUT, DENSE_LOG_PPL)
    counts = [one.samples for one in known]
    assert counts == sorted(set(counts)) and counts[0] == 4
    assert known[-1].mae_damage < known[0].mae_damage


def test_a_sum_alone_does_not_learn():
    assert learning_curve(fit_predictor("additive", SEEN, [], LAYOUT, DENSE_LOG_PPL, 0), HELDOUT, LAYOUT, DENSE_LOG_PPL) == []
