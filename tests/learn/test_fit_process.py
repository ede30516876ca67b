from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from learn_builders import LAYOUT, allocations, curves_of, plain_inner, plain_process, truth
from ppf.learn import fit_process as module
from ppf.learn.fit_process import fit_process
from ppf.learn.process import Points

CURVES = curves_of(truth())
SITES = len(LAYOUT.sites)


def points(count=40, seed=0):
    return Points.of(np.concatenate([allocations(count, ratio, seed + index) for index, ratio in enumerate((0.2, 0.5))]), CURVES)


def wavy(of, noise=0.01, seed=0):
    """A target that turns with the share that went of two sites, and of no other; as large as what the additive sum misses."""
    told = np.sin(6 * of.gone[:, 1]) + np.cos(6 * of.gone[:, 6]) + 0.5 * of.sizes
    return 0.2 * told + np.random.default_rng(seed).normal(0, noise, len(of.sizes))


def loss(hyper, scales, seen, target):
    """Negative logarithm of the marginal likelihood and of the prior (Rasmussen and Williams, equation 2.30)."""
    inner, centred, length = plain_inner(hyper, scales, seen), target - hyper[8], np.log(scales)
    likelihood = 0.5 * centred @ np.linalg.inv(inner) @ centred + 0.5 * np.linalg.slogdet(inner)[1]
    return likelihood + 0.5 * ((length - length.mean()) ** 2).sum()


@pytest.fixture(scope="module", params=[True, False])
def case(request):
    """A fit, the points that it saw, its targets, and whether places counted."""
    seen = points()
    target = wavy(seen)
    return fit_process(seen, target, request.param), seen, target, request.param


def test_a_fit_answers_as_a_plain_process_does(case):
    process, seen, target, _ = case
    new = points(20, seed=7)
    mean, std = plain_process(process.hyper, process.scales, seen, target, new)
    found = process.mean_and_std(new)
    np.testing.assert_allclose(found[0], mean, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[1], std, rtol=1e-4)


def test_fitting_makes_the_samples_likely(case):
    process, seen, target, places = case
    start = np.array([*module._START, target.mean()])
    start[4:6] *= places
    after, before = loss(process.hyper, process.scales, seen, target), loss(start, np.ones(SITES), seen, target)
    assert after < before - 10


def test_no_hyperparameter_is_far_from_its_best(case):
    process, seen, target, _ = case
    after = loss(process.hyper, process.scales, seen, target)
    for index, factor in [(index, factor) for index in range(8) for factor in (0.5, 2.0)]:
        hyper = process.hyper.copy()
        hyper[index] *= factor
        assert loss(hyper, process.scales, seen, target) > after - 1
    for index, factor in [(index, factor) for index in range(SITES) for factor in (0.5, 2.0)]:
        scales = process.scales.copy()
        scales[index] *= factor
        assert loss(process.hyper, scales, seen, target) > after - 1


@pytest.mark.parametrize("seed", range(3))
def test_a_site_that_counts_gets_a_shorter_scale_than_one_that_does_not(seed):
    seen = points(60, seed=10 * seed)
    scales = fit_process(seen, wavy(seen, seed=seed), places=True).scales
    assert scales[[1, 6]].max() < np.delete(scales, [1, 6]).min() / 1.5


def test_places_tell_what_angles_and_sizes_do_not():
    seen, new = points(60), points(60, seed=7)
    with_places, without = (
        np.abs(fit_process(seen, wavy(seen), places).mean(new) - wavy(new, noise=0)).mean() for places in (True, False)
    )
    assert with_places < without / 2


def test_without_places_nothing_depends_on_what_went():
    seen, new = points(), points(20, seed=7)
    target = wavy(seen)
    process = fit_process(seen, target, places=False)
    other = fit_process(replace(seen, gone=seen.gone[::-1].copy()), target, places=False)
    assert not process.hyper[4:6].any() and (process.scales == 1).all()
    for name in ("hyper", "weights", "inverse"):
        np.testing.assert_array_equal(getattr(other, name), getattr(process, name))
    for one, same in zip(process.mean_and_std(new), other.mean_and_std(replace(new, gone=1 - new.gone)), strict=True):
        np.testing.assert_array_equal(same, one)


@pytest.mark.parametrize("noise", [0.05, 0.2])
def test_the_noise_of_the_measurements_is_found(noise):
    seen = points(80)
    target = 0.3 * seen.sizes + np.random.default_rng(0).normal(0, noise, len(seen.sizes))
    assert fit_process(seen, target, places=True).hyper[6] == pytest.approx(noise, rel=0.3)


@pytest.mark.parametrize("places", [True, False])
def test_a_target_that_never_changes_is_its_mean(places):
    process = fit_process(points(), np.full(80, 0.7), places)
    np.testing.assert_allclose(process.mean(points(20, seed=7)), 0.7, atol=1e-3)


@pytest.mark.parametrize("places", [True, False])
def test_no_hyperparameter_leaves_its_range(places):
    seen = points()
    for target in (np.zeros(80), 50 * wavy(seen)):
        process = fit_process(seen, target, places)
        free = np.delete(process.hyper[:8], [] if places else [4, 5])
        assert free.min() > 0.999e-3 and free.max() < 100.1
        assert process.scales.min() > 0.999e-2 and process.scales.max() < 100.1


def test_a_fit_repeats_itself_and_changes_nothing_else(case):
    process, seen, target, places = case
    given = [part.copy() for part in (seen.directions, seen.sizes, seen.gone, target)]
    before = torch.get_rng_state()
    again = fit_process(seen, target, places)
    for field in fields(process):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(process, field.name))
    for part, copy in zip((seen.directions, seen.sizes, seen.gone, target), given, strict=True):
        np.testing.assert_array_equal(part, copy)
    assert torch.equal(torch.get_rng_state(), before)


def test_units_with_effects_of_their_own_are_learnt_where_no_smooth_curve_leads():
    rng = np.random.default_rng(3)
    effects = [np.concatenate([[0.0], rng.normal(0, 0.1, units).cumsum()]) for units in LAYOUT.units]

    def told(of):
        gone = np.rint(of.gone * LAYOUT.units).astype(int)
        return np.array([sum(effect[count] for effect, count in zip(effects, row, strict=True)) for row in gone])

    seen, new = points(150), points(60, seed=7)
    process = fit_process(seen, told(seen), places=True)
    assert process.hyper[5] > 0.1
    assert np.abs(process.mean(new) - told(new)).mean() < 0.5 * np.abs(told(new) - told(new).mean()).mean()
