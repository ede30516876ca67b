from dataclasses import fields

import numpy as np
import pytest

from builders import layout, refuses
from learn_builders import LAYOUT, curves_of, truth
from ppf.artifact import load_artifact, save_artifact
from ppf.errors import DamagedError, InputError
from ppf.learn.agent import Agent
from ppf.learn.baselines import knapsack
from ppf.space.allocation import allocate
from ppf.space.budget import Budget

SITES = len(LAYOUT.sites)
RATIOS = np.append(np.random.default_rng(0).uniform(0, 0.75, 60), [0.0, 1e-6, 0.001, 0.3, 0.7])


def agent(bins=1000, seed=0, max_ratio=0.6):
    """The additive optimum, disturbed."""
    keep = knapsack(curves_of(truth()), LAYOUT, bins)
    return Agent((keep + np.random.default_rng(seed).normal(0, 0.05, keep.shape)).astype(np.float32), np.array(max_ratio))


def test_a_ratio_reads_the_next_larger_row():
    ratios = np.array([0.0, 1e-4, 0.001, 0.0011, 0.1, 0.3, 0.7, 0.9995, 1.0])
    assert agent().rows(ratios).tolist() == [0, 1, 1, 2, 100, 300, 700, 1000, 1000]


def test_the_largest_trained_ratio_reads_a_trained_row():
    one = agent(max_ratio=0.6504)
    assert one.rows(np.array([0.6499, 0.6501, 0.6504, 0.6505, 0.6511])).tolist() == [650, 650, 650, 651, 652]


@pytest.mark.parametrize("bins", [1, 7, 100, 1000])
def test_the_ratio_of_a_row_reads_that_row(bins):
    assert agent(bins, max_ratio=1.0).rows(np.arange(bins + 1) / bins).tolist() == list(range(bins + 1))


def test_a_proposal_is_the_row_of_its_ratio():
    one = agent()
    for ratio, row in ((0.0, 0), (0.2, 200), (0.2001, 201), (0.6, 600), (0.95, 950)):
        np.testing.assert_array_equal(one.propose(ratio).keep, one.keep[row])


@pytest.mark.parametrize("bins", [20, 1000])
def test_what_it_keeps_meets_every_budget_to_within_a_channel(bins):
    remove = np.array([Budget.from_ratio(float(ratio), LAYOUT).remove for ratio in RATIOS])
    kept = agent(bins).kept(RATIOS, LAYOUT)
    over = (LAYOUT.units - kept) @ LAYOUT.costs - remove
    assert (over >= 0).all() and (over < LAYOUT.costs.min()).all()
    assert (kept >= LAYOUT.floors).all() and (kept <= LAYOUT.units).all()


def test_many_ratios_at_once_are_those_of_each():
    one = agent()
    each = [allocate(one.propose(ratio), Budget.from_ratio(ratio, LAYOUT), LAYOUT).kept for ratio in RATIOS.tolist()]
    np.testing.assert_array_equal(one.kept(RATIOS, LAYOUT), each)


def test_ratios_that_the_floors_do_not_allow_are_refused():
    with refuses(InputError):
        agent().kept(np.array([0.3, 0.999]), LAYOUT)


# --- files ---


def test_what_is_saved_reloads_bit_equal(tmp_path):
    one = agent()
    one.save(tmp_path / "a", LAYOUT)
    loaded = Agent.load(tmp_path / "a", LAYOUT)
    for field in fields(Agent):
        before, after = getattr(one, field.name), getattr(loaded, field.name)
        assert before.dtype == after.dtype and before.tobytes() == after.tobytes()
    np.testing.assert_array_equal(loaded.kept(RATIOS, LAYOUT), one.kept(RATIOS, LAYOUT))


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
    agent().save(tmp_path / "a", LAYOUT)
    arrays, _ = load_artifact(tmp_path / "a", "agent")
    if change == "missing":
        del arrays["max_ratio"]
    if change == "too many":
        arrays["damage"] = np.zeros(3)
    save_artifact(tmp_path / "a", "predictor" if change == "a predictor" else "agent", LAYOUT.fingerprint, arrays)
    with refuses(DamagedError):
        Agent.load(tmp_path / "a", LAYOUT)
