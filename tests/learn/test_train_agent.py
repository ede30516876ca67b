from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from learn_builders import LAYOUT, curves_of, truth
from ppf.learn import train_agent as module
from ppf.learn.agent import Agent, Prior
from ppf.learn.baselines import knapsack
from ppf.learn.environment import PruningEnv
from ppf.learn.train_agent import AgentConfig, train_agent

LOW, HIGH = 0.05, 0.6
SHORT = AgentConfig(iterations=3, ratios=4, group=4, hidden=8)
LONG = AgentConfig(iterations=120, ratios=8, group=16)


def prior(of):
    curves = curves_of(of)
    return Prior.of(knapsack(curves, LAYOUT), curves)


def trained(of, config=SHORT, seed=0, objective=None, advance=lambda reward: None):
    return train_agent(prior(of), objective or of, LAYOUT, LOW, HIGH, seed, config, advance)


def arrays(agent):
    return {field.name: getattr(agent, field.name) for field in fields(Agent)}


def test_before_training_the_agent_is_the_prior():
    of = truth()
    agent = trained(of, replace(SHORT, iterations=0))
    for ratio in (0.05, 0.3, 0.6):
        np.testing.assert_array_equal(agent.propose(ratio).keep, prior(of).keep[round(1000 * ratio)])


@pytest.mark.parametrize("seed", range(2))
def test_training_does_less_damage_than_the_prior_at_most_ratios(seed):
    of, ratios = truth(seed), np.linspace(LOW, HIGH, 40)
    agent, env = trained(of, LONG), PruningEnv(prior(of), of, LAYOUT, LOW, HIGH)
    rewards = env.rewards(ratios, agent.correction(ratios), env.baseline(ratios))
    assert (rewards > 0).mean() > 0.8 and rewards.mean() > 0.1


def test_where_sites_do_not_interact_little_is_lost():
    of, ratios = truth(0, strength=0.0), np.linspace(LOW, HIGH, 40)
    agent, env = trained(of, LONG), PruningEnv(prior(of), of, LAYOUT, LOW, HIGH)
    assert env.rewards(ratios, agent.correction(ratios), env.baseline(ratios)).mean() > -0.1


def test_an_agent_is_decided_by_its_seed_alone():
    one, again, other = (arrays(trained(truth(), seed=seed)) for seed in (1, 1, 2))
    for name, array in one.items():
        np.testing.assert_array_equal(array, again[name])
    assert all((one[name] != other[name]).any() for name in ("weight1", "weight2", "weight3", "bias3"))


def test_training_leaves_global_randomness_alone():
    before = torch.get_rng_state(), np.random.get_state()
    trained(truth())
    assert torch.equal(torch.get_rng_state(), before[0])
    np.testing.assert_array_equal(np.random.get_state()[1], before[1][1])
    assert np.random.get_state()[2] == before[1][2]


def test_the_agent_answers_as_the_network_that_was_trained():
    of, ratios = truth(), np.linspace(0, HIGH, 20)
    generator = torch.Generator().manual_seed(0)
    network = module._network(PruningEnv(prior(of), of, LAYOUT, LOW, HIGH), 24, generator)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    expected = network(torch.from_numpy(prior(of).state(ratios))).detach().numpy()
    np.testing.assert_allclose(module._frozen(network, prior(of), HIGH).correction(ratios), expected, atol=1e-5)


def test_only_allocations_of_the_range_are_asked_for():
    shares = []

    def objective(kept):
        assert (kept >= LAYOUT.floors).all() and (kept <= LAYOUT.units).all()
        shares.extend((LAYOUT.units - kept) @ LAYOUT.costs / LAYOUT.prunable)
        return truth()(kept)

    trained(truth(), objective=objective)
    step = LAYOUT.costs.min() / LAYOUT.prunable
    assert min(shares) >= LOW and max(shares) < HIGH + step
    assert len(shares) == SHORT.iterations * SHORT.ratios * (2 + SHORT.group)


def test_each_round_tells_what_the_agent_earns_without_noise():
    told = []
    trained(truth(), replace(SHORT, iterations=60, ratios=8, group=16), advance=told.append)
    assert len(told) == 60 and told[0] == 0
    assert np.mean(told[-10:]) > 0.1 and np.mean(told[-10:]) > np.mean(told[:10])


def test_the_agent_knows_its_prior_and_its_range():
    of = truth()
    agent = trained(of)
    assert agent.max_ratio == HIGH
    np.testing.assert_array_equal(agent.keep, prior(of).keep)
    np.testing.assert_array_equal(agent.damage, prior(of).damage)
