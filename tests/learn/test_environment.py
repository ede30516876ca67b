import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from builders import refuses
from learn_builders import LAYOUT, curves_of, truth
from ppf.errors import InputError
from ppf.learn.agent import Prior
from ppf.learn.baselines import knapsack
from ppf.learn.environment import PruningEnv
from ppf.learn.predictor import NOISE
from ppf.space.allocation import allocate
from ppf.space.budget import Budget
from ppf.space.policy import Policy

CURVES = curves_of(truth())
PRIOR = Prior.of(knapsack(CURVES, LAYOUT), CURVES)
RATIOS = np.linspace(0.05, 0.6, 9)


@pytest.fixture
def env():
    return PruningEnv(PRIOR, truth(), LAYOUT, 0.05, 0.6)


def damage(wish, ratio):
    """Of a policy at a ratio, in the plain way."""
    return truth()(allocate(Policy(wish), Budget.from_ratio(float(ratio), LAYOUT), LAYOUT).kept)


def actions(count, seed=0):
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (count, len(LAYOUT.sites))).astype(np.float32)


def test_gymnasium_accepts_the_environment(env):
    check_env(env, skip_render_check=True)


def test_doing_nothing_earns_nothing(env):
    for ratio in RATIOS:
        env.reset(options={"ratio": ratio})
        assert env.step(np.zeros(len(LAYOUT.sites), np.float32))[1] == 0


def test_the_reward_is_the_logarithm_of_the_prior_s_damage_over_the_policy_s(env):
    for ratio, action in zip(RATIOS, actions(len(RATIOS)), strict=True):
        keep = PRIOR.keep[int(np.ceil(1000 * ratio - 1e-9))]
        expected = np.log((damage(keep, ratio) + NOISE) / (damage(keep + action, ratio) + NOISE))
        env.reset(options={"ratio": ratio})
        assert env.step(action)[1] == pytest.approx(expected, abs=1e-9)


def test_many_rewards_at_once_are_those_of_single_steps(env):
    many = env.rewards(RATIOS, actions(len(RATIOS)), env.baseline(RATIOS))
    for ratio, action, reward in zip(RATIOS, actions(len(RATIOS)), many, strict=True):
        env.reset(options={"ratio": ratio})
        assert env.step(action)[1] == pytest.approx(reward, abs=1e-12)


def test_an_episode_is_one_decision(env):
    state, info = env.reset(seed=1)
    assert state in env.observation_space and state[0] == pytest.approx(info["ratio"])
    after, reward, terminated, truncated, again = env.step(env.action_space.sample())
    assert (terminated, truncated) == (True, False) and again == info and type(reward) is float
    np.testing.assert_array_equal(after, state)


def test_ratios_fill_the_range_and_follow_the_seed(env):
    ratios = [env.reset(seed=5)[1]["ratio"], *(env.reset()[1]["ratio"] for _ in range(200))]
    assert [env.reset(seed=5)[1]["ratio"], *(env.reset()[1]["ratio"] for _ in range(200))] == ratios
    assert 0.05 <= min(ratios) < 0.08 and 0.57 < max(ratios) <= 0.6


def test_every_state_lies_in_the_observed_space(env):
    for ratio in np.linspace(0, 0.999, 40):
        assert env.reset(options={"ratio": ratio})[0] in env.observation_space


def test_parameters_that_must_go_are_those_of_the_budget(env):
    ratios = np.append(RATIOS, [0.0, 0.1, 0.3])
    expected = [Budget.from_ratio(float(ratio), LAYOUT).remove for ratio in ratios]
    assert env.removed(ratios).tolist() == expected


def test_an_action_that_is_no_number_is_refused(env):
    env.reset(seed=0)
    with refuses(InputError):
        env.step(np.full(len(LAYOUT.sites), np.nan, np.float32))
