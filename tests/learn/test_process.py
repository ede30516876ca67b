from dataclasses import replace

import numpy as np
import pytest

from learn_builders import LAYOUT, allocations, curves_of, plain_inner, plain_process, truth
from ppf.learn.process import NOISE, Points, Process

CURVES = curves_of(truth())
SITES = len(LAYOUT.sites)
HYPERS = {
    "all": (0.4, 0.6, 1.2, 0.2, 0.3, 0.2, 0.05, 0.5, -0.2),
    "angles and sizes": (0.5, 0.3, 0.7, 0.05, 0.0, 0.0, 0.02, 0.1, 0.3),
    "places": (0.001, 0.7, 1.5, 0.001, 0.8, 0.001, 0.1, 0.001, 0.0),
    "walks": (0.001, 0.7, 1.5, 0.001, 0.0, 0.8, 0.1, 0.001, 0.0),
    "line": (0.001, 0.5, 1.0, 0.9, 0.001, 0.001, 0.3, 2.0, 1.5),
}


def points(count=12, seed=0):
    """Of scattered allocations, the dense model in front."""
    kept = np.concatenate([allocations(count, ratio, seed) for ratio in (0.05, 0.3, 0.6)])
    return Points.of(np.concatenate([LAYOUT.units[None], kept]), CURVES)


def row(of, index):
    return Points(of.directions[index], of.sizes[index], of.gone[index])


def process_of(hyper, scales, seen, target):
    """What a fit to the samples makes, its hyperparameters given."""
    inner = plain_inner(hyper, scales, seen)
    inverse = np.linalg.inv(np.linalg.cholesky(inner))
    weights = np.linalg.solve(inner, target - hyper[-1])
    return Process(seen.directions, seen.sizes, seen.gone, scales, hyper, weights, inverse)


@pytest.fixture(params=sorted(HYPERS))
def case(request):
    """A process, the points that it saw and its targets."""
    rng = np.random.default_rng(len(request.param))
    hyper, scales, seen = np.array(HYPERS[request.param]), rng.uniform(0.2, 2.0, SITES), points()
    target = hyper[-1] + rng.normal(0, 0.5, len(seen.sizes))
    return process_of(hyper, scales, seen, target), seen, target


# --- points ---


def test_points_hold_the_damage_its_direction_and_what_went():
    kept = allocations(20, 0.4, 3)
    found, single = Points.of(kept, CURVES), CURVES.damages(kept)
    for index in range(len(kept)):
        total = single[index].sum()
        assert np.exp(found.sizes[index]) == pytest.approx(total + NOISE)
        np.testing.assert_allclose(found.directions[index] ** 2 * (total + NOISE), single[index])
        np.testing.assert_allclose((1 - found.gone[index]) * LAYOUT.units, kept[index])


def test_the_dense_model_lies_at_the_origin():
    found = Points.of(LAYOUT.units[None], CURVES)
    assert found.sizes[0] == np.log(NOISE) and not found.directions.any() and not found.gone.any()


# --- answers ---


def test_a_process_answers_as_a_plain_one_does(case):
    process, seen, target = case
    new = points(seed=5)
    mean, std = plain_process(process.hyper, process.scales, seen, target, new)
    found = process.mean_and_std(new)
    np.testing.assert_allclose(found[0], mean, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found[1], std, rtol=1e-6)
    np.testing.assert_array_equal(process.mean(new), found[0])


def test_a_batch_is_its_rows(case):
    process, new = case[0], points(seed=5)
    batch = process.mean_and_std(new)
    for index in range(len(new.sizes)):
        one = process.mean_and_std(row(new, [index]))
        np.testing.assert_allclose([part[0] for part in one], [part[index] for part in batch], rtol=1e-7, atol=1e-9)


def test_what_was_left_out_is_what_the_others_do_not_say(case):
    process, seen, target = case
    found = process.left_out()
    for index in range(len(target)):
        others = np.delete(np.arange(len(target)), index)
        without = process_of(process.hyper, process.scales, row(seen, others), target[others])
        assert found[index] == pytest.approx(target[index] - without.mean(row(seen, [index]))[0], rel=1e-6, abs=1e-9)


def test_an_exact_measurement_is_said_back():
    hyper, seen = np.array((0.5, 0.5, 1.0, 0.1, 0.5, 0.1, 1e-3, 1e-3, 0.0)), points(4)
    target = np.random.default_rng(0).normal(0, 0.3, len(seen.sizes))
    process = process_of(hyper, np.full(SITES, 0.3), seen, target)
    mean, std = process.mean_and_std(seen)
    np.testing.assert_allclose(mean, target, atol=1e-3)
    assert (std < 0.01).all() and (std >= 1e-3).all()


def test_the_standard_deviation_is_never_below_the_noise_and_rises_away_from_the_samples(case):
    process, seen, _ = case
    far = Points(np.eye(SITES), np.full(SITES, 3.0), np.eye(SITES))
    (_, near), (_, away) = process.mean_and_std(seen), process.mean_and_std(far)
    assert (near >= process.hyper[6]).all() and np.median(away) > np.median(near)


@pytest.mark.parametrize(("weights", "counts"), [((0.0, 0.0), False), ((0.3, 0.0), True), ((0.0, 0.3), True)])
def test_which_sites_went_counts_by_itself_where_it_has_a_weight(weights, counts):
    hyper, seen, new = np.array(HYPERS["all"]), points(), points(seed=5)
    hyper[4:6] = weights
    target = np.random.default_rng(0).normal(0, 0.5, len(seen.sizes))
    process = process_of(hyper, np.ones(SITES), seen, target)
    elsewhere = replace(new, gone=1 - new.gone)
    for one, other in zip(process.mean_and_std(new), process.mean_and_std(elsewhere), strict=True):
        assert (one != other).any() == counts


# --- the first few ---


@pytest.mark.parametrize("count", [1, 5, 36])
def test_the_first_few_are_what_a_process_of_them_alone_is(case, count):
    process, seen, target = case
    few = row(seen, slice(0, count))
    expected, found = process_of(process.hyper, process.scales, few, target[:count]), process.first(count)
    new = points(seed=5)
    for one, other in zip(expected.mean_and_std(new), found.mean_and_std(new), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-8)


def test_all_of_them_are_the_process_itself(case):
    process, seen, target = case
    np.testing.assert_allclose(process.centred, target - process.hyper[-1], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(process.first(len(seen.sizes)).weights, process.weights, rtol=1e-5, atol=1e-6)
