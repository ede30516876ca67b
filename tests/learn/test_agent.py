from dataclasses import fields, replace

import numpy as np
import pytest

from builders import layout, refuses
from learn_builders import LAYOUT, curves_of, truth
from ppf.artifact import load_artifact, save_artifact
from ppf.errors import DamagedError
from ppf.learn.agent import Agent, Prior, prior_kept
from ppf.learn.baselines import knapsack
from ppf.space.budget import Budget

CURVES = curves_of(truth())
PRIOR = Prior.of(knapsack(CURVES, LAYOUT), CURVES)
SITES, HIDDEN = len(LAYOUT.sites), 16


def agent(last=0.3, seed=0, max_ratio=0.6):
    """Random weights; with ``last`` 0 its last layer is empty."""
    rng = np.random.default_rng(seed)
    sizes = [(1 + 2 * SITES, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, SITES)]
    arrays = [
        rng.normal(0, scale, size).astype(np.float32)
        for shape, scale in zip(sizes, (0.5, 0.5, last), strict=True)
        for size in (shape, shape[1:])
    ]
    return Agent(PRIOR.keep, PRIOR.damage, *arrays, np.array(max_ratio))


# --- the prior ---


def test_a_ratio_reads_the_next_larger_row():
    ratios = np.array([0.0, 1e-4, 0.001, 0.0011, 0.1, 0.3, 0.7, 0.9995, 1.0])
    assert PRIOR.rows(ratios).tolist() == [0, 1, 1, 2, 100, 300, 700, 1000, 1000]
    for bins in (100, 1000):
        prior = Prior(PRIOR.keep[: bins + 1], PRIOR.damage[: bins + 1])
        assert prior.rows(np.arange(bins + 1) / bins).tolist() == list(range(bins + 1))


def test_the_prior_removes_what_is_asked_for():
    ratios = np.random.default_rng(0).uniform(0, 0.7, 200)
    kept = np.rint(PRIOR.keep[PRIOR.rows(ratios)] * LAYOUT.units)
    assert ((LAYOUT.units - kept) @ LAYOUT.costs >= ratios * LAYOUT.prunable).all()


def test_the_damage_of_the_prior_is_read_off_its_curves():
    kept = np.rint(PRIOR.keep * LAYOUT.units).astype(int)
    np.testing.assert_allclose(PRIOR.damage, CURVES.damages(kept), rtol=1e-6)
    np.testing.assert_allclose(PRIOR.damage.sum(1), truth(strength=0.0)(kept), rtol=1e-5)


def test_a_state_is_the_ratio_the_prior_and_where_its_damage_lies():
    ratios = np.array([0.0, 0.2, 0.55])
    states = PRIOR.state(ratios)
    assert states.shape == (3, 1 + 2 * SITES) and states.dtype == np.float32
    np.testing.assert_allclose(states[:, 0], ratios, rtol=1e-6)
    np.testing.assert_array_equal(states[:, 1 : 1 + SITES], PRIOR.keep[[0, 200, 550]])
    damage = PRIOR.damage[[0, 200, 550]]
    np.testing.assert_allclose(states[:, 1 + SITES :] ** 2 * (damage.sum(1, keepdims=True) + 0.01), damage, atol=1e-5)


def test_what_the_prior_keeps_meets_the_budgets():
    ratios = np.linspace(0.01, 0.7, 20)
    remove = np.array([Budget.from_ratio(float(ratio), LAYOUT).remove for ratio in ratios])
    over = (LAYOUT.units - prior_kept(PRIOR, ratios, remove, LAYOUT)) @ LAYOUT.costs - remove
    assert (over >= 0).all() and (over < LAYOUT.costs.min()).all()


# --- the agent ---


def test_an_empty_last_layer_is_the_prior_itself():
    empty = agent(last=0.0)
    for ratio in (0.0, 0.123, 0.4, 0.6, 0.9):
        np.testing.assert_array_equal(empty.propose(ratio).keep, PRIOR.keep[int(np.ceil(ratio * 1000 - 1e-9))])


def test_a_proposal_is_the_prior_and_the_correction():
    one = agent()
    for ratio in (0.05, 0.3, 0.6):
        correction = one.correction(np.array([ratio]))[0]
        assert np.abs(correction).max() > 0.01
        np.testing.assert_allclose(one.propose(ratio).keep, PRIOR.keep[round(1000 * ratio)] + correction, rtol=1e-6)


def test_corrections_of_many_ratios_are_those_of_each():
    one, ratios = agent(), np.linspace(0, 0.9, 30)
    many = one.correction(ratios)
    assert many.shape == (30, SITES)
    np.testing.assert_allclose(many, [one.correction(ratio[None])[0] for ratio in ratios], atol=1e-6)


def test_beyond_its_range_the_correction_stays_and_the_prior_goes_on():
    one = agent(max_ratio=0.4)
    last = one.correction(np.array([0.4]))[0]
    for ratio in (0.41, 0.7, 0.95, 0.999999):
        np.testing.assert_array_equal(one.correction(np.array([ratio]))[0], last)
        keep = one.propose(ratio).keep
        assert np.isfinite(keep).all()
        np.testing.assert_allclose(keep - last, PRIOR.keep[int(np.ceil(ratio * 1000))], atol=1e-6)


# --- files ---


def test_what_is_saved_proposes_the_same(tmp_path):
    one = agent()
    one.save(tmp_path / "a", LAYOUT)
    loaded = Agent.load(tmp_path / "a", LAYOUT)
    for field in fields(Agent):
        np.testing.assert_array_equal(getattr(loaded, field.name), getattr(one, field.name))
    for ratio in (0.01, 0.3, 0.6, 0.8):
        np.testing.assert_array_equal(loaded.propose(ratio).keep, one.propose(ratio).keep)


def test_an_agent_of_another_model_is_refused(tmp_path):
    agent().save(tmp_path / "a", LAYOUT)
    with refuses(DamagedError):
        Agent.load(tmp_path / "a", layout(layers=4, heads=4, groups=4, ffn=49))


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "a"
    agent().save(path, LAYOUT)
    data = path.read_bytes()
    for damaged in (b"", data[:20], data[: len(data) // 2], data[:-1], data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]):
        path.write_bytes(damaged)
        with refuses(DamagedError):
            Agent.load(path, LAYOUT)
    path.unlink()
    with refuses(DamagedError):
        Agent.load(path, LAYOUT)


@pytest.mark.parametrize("change", ["missing", "too many", "a predictor"])
def test_a_file_that_holds_no_agent_is_refused(tmp_path, change):
    replace(agent()).save(tmp_path / "a", LAYOUT)
    arrays, _ = load_artifact(tmp_path / "a", "agent")
    if change == "missing":
        del arrays["bias2"]
    if change == "too many":
        arrays["bias4"] = np.zeros(3)
    save_artifact(tmp_path / "a", "predictor" if change == "a predictor" else "agent", LAYOUT.fingerprint, arrays)
    with refuses(DamagedError):
        Agent.load(tmp_path / "a", LAYOUT)
