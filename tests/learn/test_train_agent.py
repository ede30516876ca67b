from dataclasses import replace

import numpy as np
import pytest
import torch

from learn_builders import LAYOUT, curves_of, truth
from ppf.learn import train_agent as module
from ppf.learn.agent import Agent
from ppf.learn.baselines import knapsack
from ppf.learn.process import NOISE
from ppf.learn.search import refine
from ppf.learn.train_agent import AgentConfig, train_agent
from ppf.space.allocation import allocate_many
from ppf.space.budget import removed

LOW, HIGH = 0.05, 0.6
SHORT = AgentConfig(steps=6)
PLACES = np.arange(50, 601, 5)
ROWS = np.arange(50, 601)


def additive(of):
    return Agent(knapsack(curves_of(of), LAYOUT), np.array(0.9))


def trained(of, config=SHORT, seed=0, low=LOW, high=HIGH, start=None, advance=lambda gain: None):
    return train_agent(start or additive(truth()), of, LAYOUT, low, high, seed, config, advance)


def damage(of, keep, rows):
    """Of policies, each at the ratio of a row."""
    return of(allocate_many(keep, np.array([removed(row / 1000, LAYOUT) for row in rows]), LAYOUT))


class Asked:
    """An objective that remembers what it was asked."""

    def __init__(self, of):
        self.of, self.kept = of, []

    def __call__(self, kept):
        self.kept.extend(kept.copy())
        return self.of(kept)


# --- how good it is ---


@pytest.mark.parametrize("seed", range(3))
def test_no_trained_ratio_gets_worse_and_nearly_all_get_better(seed):
    of, start = truth(seed), additive(truth(seed))
    before = damage(of, start.keep[PLACES], PLACES)
    after = damage(of, trained(of, seed=seed, start=start).keep[PLACES], PLACES)
    assert (after <= before).all() and (after < before).mean() > 0.8
    longer = damage(of, trained(of, replace(SHORT, steps=24), seed, start=start).keep[PLACES], PLACES)
    assert np.log(before / longer).mean() > np.log(before / after).mean() > 0.1


def test_little_changes_where_the_start_is_best():
    of = truth(strength=0.0)
    start = additive(of)
    gains = np.log(damage(of, start.keep[ROWS], ROWS) / damage(of, trained(of, start=start).keep[ROWS], ROWS))
    assert gains.min() >= 0 and gains.mean() < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_the_table_is_within_a_percent_of_searching_each_ratio_alone(seed):
    of, start, rows = truth(seed, strength=0.3), additive(truth(seed)), np.arange(73, 600, 62)
    ours = damage(of, trained(of, AgentConfig(), seed, start=start).keep[rows], rows)
    searched = [
        refine(of, start.keep[[row]], removed(row / 1000, LAYOUT), LAYOUT, 60, np.random.default_rng(seed))[1][0] for row in rows
    ]
    assert np.log(ours / searched).mean() < 0.01


@pytest.mark.parametrize("stride", [5, 40])
@pytest.mark.parametrize("seed", range(3))
def test_a_row_between_two_trained_ones_is_never_worse_than_either_or_than_the_start(seed, stride):
    of, start = truth(seed), additive(truth(seed))
    places: np.ndarray = np.append(np.arange(50, 600, stride), 600)
    wishes = start.keep[places] + np.random.default_rng(seed).normal(0, 0.1, (len(places), len(LAYOUT.sites)))
    given = allocate_many(wishes, np.array([removed(place / 1000, LAYOUT) for place in places]), LAYOUT) / LAYOUT.units
    table = module._filled(start, given, places, of, LAYOUT)
    after, ours = np.searchsorted(places, ROWS), damage(of, table[ROWS], ROWS)
    rivals = (given[after], given[np.maximum(after - 1, 0)], start.keep[ROWS])
    theirs = np.array([damage(of, rival.astype(np.float32), ROWS) for rival in rivals])
    np.testing.assert_array_equal(ours, theirs.min(axis=0))
    assert len(np.unique(theirs.argmin(axis=0))) == 3


@pytest.mark.parametrize("seed", range(3))
def test_trained_rows_beat_their_trained_neighbours(seed):
    of = truth(seed)
    keep = trained(of, AgentConfig(), seed, start=additive(of)).keep
    ours, away = damage(of, keep[ROWS], ROWS), np.arange(-5, 6)
    for step in away:
        other = keep[np.clip(ROWS + step, 50, 600)]
        assert (damage(of, other, ROWS) >= ours * 0.999).mean() > 0.98


def test_what_is_good_at_one_ratio_spreads_to_all():
    """A pattern is worth much wherever it holds; no exchange leads to it from where all begin, all but one."""
    hidden = np.tile([0.0, 0.0, 1.0, 1.0], len(LAYOUT.sites) // 4)
    start = Agent(np.tile(1 - hidden, (1001, 1)), np.array(0.9))
    places = np.arange(150, 451, 5)

    def of(kept):
        keep = kept / LAYOUT.units
        alike = (keep - keep.mean(axis=1, keepdims=True)) @ (hidden - 0.5) / (keep.std(axis=1) * 0.5 + 1e-9) / len(hidden)
        return np.where(alike > 0.9, 1.5 - alike, 1.0)

    def found(steps):
        return damage(of, trained(of, AgentConfig(steps=steps), 0, 0.15, 0.45, start).keep[places], places)

    assert (found(40) == 1).all()
    start.keep[300] = hidden
    first, last = places[found(1) < 1], places[found(40) < 1]
    assert len(first) > 1 and np.abs(first - 300).max() <= 5 * AgentConfig().reach
    assert len(last) == len(places)


# --- what it asks for ---


@pytest.mark.parametrize("config", [SHORT, AgentConfig(steps=3, rivals=5, stride=20), AgentConfig(steps=0)])
def test_each_policy_meets_so_many_rivals_a_round_and_each_row_is_settled_among_three(config):
    of = Asked(truth())
    trained(of, config)
    policies = len(range(50, 600, config.stride)) + 1
    assert len(of.kept) == policies * (1 + config.steps * config.rivals) + 3 * len(ROWS)


def test_only_allocations_of_the_range_are_asked_for():
    of = Asked(truth())
    trained(of)
    kept = np.array(of.kept)
    shares = (LAYOUT.units - kept) @ LAYOUT.costs / LAYOUT.prunable
    assert (kept >= LAYOUT.floors).all() and (kept <= LAYOUT.units).all()
    assert shares.min() >= LOW and shares.max() < HIGH + LAYOUT.costs.min() / LAYOUT.prunable


def test_each_round_tells_the_gain_so_far():
    told, of, start = [], truth(), additive(truth())
    agent = trained(of, start=start, advance=told.append)
    assert len(told) == SHORT.steps and told[0] > 0 and (np.diff(told) >= 0).all()
    before, after = (damage(of, keep[PLACES], PLACES) for keep in (start.keep, agent.keep))
    assert told[-1] <= np.log((before + NOISE) / (after + NOISE)).mean() + 1e-12  # filling may take a neighbour's that is better
    assert told[-1] == pytest.approx(np.log((before + NOISE) / (after + NOISE)).mean(), abs=1e-3)


# --- the table ---


@pytest.mark.parametrize(("low", "high"), [(0.05, 0.6), (0.1, 0.3), (0.052, 0.0537), (0.02, 0.3009), (0.3, 0.5005)])
def test_rows_outside_the_range_stay_as_they_were(low, high):
    start = additive(truth())
    before = start.keep.copy()
    agent = trained(truth(), low=low, high=high, start=start)
    rows: np.ndarray = np.arange(1001)
    outside = (rows < low * 1000) | (rows > high * 1000)
    np.testing.assert_array_equal(agent.keep[outside], start.keep[outside].astype(np.float32))
    np.testing.assert_array_equal(start.keep, before)
    assert agent.keep.shape == start.keep.shape and agent.keep.dtype == np.float32
    assert (agent.keep[~outside] != start.keep[~outside].astype(np.float32)).any()


@pytest.mark.parametrize("high", [0.3, 0.45, 0.6])
def test_the_range_is_kept_with_the_table(high):
    assert trained(truth(), high=high).max_ratio == high


def test_every_policy_meets_its_budget():
    agent, ratios = trained(truth()), np.random.default_rng(0).uniform(0, 0.7, 100)
    over = (LAYOUT.units - agent.kept(ratios, LAYOUT)) @ LAYOUT.costs - [removed(float(ratio), LAYOUT) for ratio in ratios]
    assert (over >= 0).all() and (over < LAYOUT.costs.min()).all()


def test_an_agent_is_decided_by_its_seed_alone():
    one, again, other = (trained(truth(), seed=seed).keep for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()


def test_training_leaves_global_randomness_alone():
    before = torch.get_rng_state(), np.random.get_state()
    trained(truth())
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1][1])
    assert np.random.get_state()[2] == before[1][2]
