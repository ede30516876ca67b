"""Which learner makes the better agent, for the same number of questions to the same predictor?

All begin with the additive optimum of every ratio. Score: mean over 25 ratios that no learner trained on of log(damage of
the start / damage of the policy) under the predictor's objective, so 0 is the start and 0.1 is about 10 % less damage. The
shortfall is what searching each of these ratios alone gains beyond that.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.utils.env_checker import check_env
from stable_baselines3.common.base_class import BaseAlgorithm

from by_gradient import Twin, by_gradient
from ppf.decide import Decider
from ppf.learn.agent import Agent
from ppf.learn.baselines import knapsack
from ppf.learn.objective import Objective, predicted
from ppf.learn.predictor import Corrected
from ppf.learn.process import NOISE
from ppf.learn.search import refine
from ppf.learn.train_agent import AgentConfig, train_agent
from ppf.space.allocation import allocate_many
from ppf.space.budget import removed
from record import write
from reinforcement import PruningEnv, group_relative
from stable_learners import ppo, sac, td3

LOW, HIGH, PART = 0.02, 0.65, 0.35
RATIOS = 0.0312 + 0.025 * np.arange(25)
"""No row of these is trained: they lie between the evolution strategy's, and the others train on whole thousandths."""
SEARCH_STEPS = 80

Learner = Callable[[PruningEnv, int, int], np.ndarray]
"""Environment, questions and seed -> Float[25, S] wishes at ``RATIOS``."""


class Counted:
    """An objective that counts the allocations that it is asked about."""

    def __init__(self, objective: Objective) -> None:
        self.objective, self.asked = objective, 0

    def __call__(self, kept: np.ndarray) -> np.ndarray:
        """See ``Objective``."""
        self.asked += len(kept)
        return self.objective(kept)


def evolution(env: PruningEnv, questions: int, seed: int) -> np.ndarray:
    """Ours, with as many rounds as the questions allow."""
    config = AgentConfig()
    policies, filling = len(env.ratios) / config.stride + 1, 3 * len(env.ratios)
    steps = max(1, int((questions - policies - filling) / (policies * config.rivals)))
    agent = train_agent(env.start, env.objective, env.layout, env.low, env.high, seed, AgentConfig(steps=steps))
    return agent.keep[agent.rows(RATIOS)]


def corrected_by(env: PruningEnv, correct: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The start and what a network says at each ratio's state."""
    return env.start.keep[env.start.rows(RATIOS)] + correct(env.states_of(RATIOS))


def network(learn: Callable[..., torch.nn.Module]) -> Learner:
    """A learner whose result is a network."""

    def learner(env: PruningEnv, questions: int, seed: int) -> np.ndarray:
        trained = learn(env, questions, seed)
        return corrected_by(env, lambda states: trained(torch.from_numpy(states)).detach().numpy())

    return learner


def stable(learn: Callable[..., BaseAlgorithm]) -> Learner:
    """A learner of stable-baselines3."""

    def learner(env: PruningEnv, questions: int, seed: int) -> np.ndarray:
        model = learn(env, questions, seed)
        return corrected_by(env, lambda states: model.predict(states, deterministic=True)[0])

    return learner


def each_alone(env: PruningEnv, questions: int, seed: int) -> np.ndarray:
    """Search at each ratio alone; it asks as much as it likes."""
    rng, found = np.random.default_rng(seed), []
    for ratio in RATIOS:
        begin = env.start.keep[env.start.rows(np.array([ratio]))]
        best, _ = refine(env.objective, begin, removed(float(ratio), env.layout), env.layout, SEARCH_STEPS, rng)
        found.append(best[0] / env.layout.units)
    return np.array(found)


def logs(env: PruningEnv, wishes: np.ndarray) -> np.ndarray:
    """Float[25]: logarithm of the damage of wishes at ``RATIOS``."""
    remove = np.array([removed(float(ratio), env.layout) for ratio in RATIOS])
    return np.log(env.objective(allocate_many(wishes, remove, env.layout)) + NOISE)


def judge(learn: Learner, env: PruningEnv, counted: Counted, questions: int, seeds: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Float[seeds, 25] gains, and what was spent."""
    gains, asked, seconds = [], [], []
    before = logs(env, env.start.keep[env.start.rows(RATIOS)])
    for seed in range(seeds):
        counted.asked, begin = 0, time.perf_counter()
        wishes = learn(env, questions, seed)
        seconds.append(round(time.perf_counter() - begin, 1))
        asked.append(counted.asked)
        gains.append(before - logs(env, wishes))
    return np.array(gains), {"questions": asked, "seconds": seconds}


def rounded(values: np.ndarray) -> list[float]:
    return [round(float(value), 4) for value in values]


def check(env: PruningEnv, twin: Callable[[np.ndarray], np.ndarray]) -> None:
    """The environment is one, doing nothing earns nothing, no scored row is trained on, and the twin is the predictor."""
    check_env(env, skip_render_check=True)
    places: np.ndarray = np.arange(len(env.ratios))
    actions = np.zeros((len(places), len(env.layout.sites)))
    np.testing.assert_allclose(env.rewards(places, actions), 0, atol=1e-12)
    rows = env.start.rows(RATIOS) - env.start.rows(np.array([LOW]))
    assert (rows % AgentConfig().stride != 0).all()
    wishes = env.start.keep[env.start.rows(env.ratios)] + np.random.default_rng(0).normal(0, 0.1, actions.shape)
    kept = allocate_many(wishes, env.remove, env.layout)
    np.testing.assert_allclose(twin(kept), env.objective(kept), rtol=1e-4, atol=1e-6)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", default="runs/demo")
    parser.add_argument("--questions", type=int, default=150_000)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    decider = Decider(arguments.study)
    estimator = decider.predictor.estimator
    if not isinstance(estimator, Corrected):
        parser.error(f"--study must have the corrected predictor; it has {estimator.kind}; fit it with --predictor corrected")
    objective = Counted(predicted(decider.predictor))
    start = Agent(knapsack(estimator.curves, decider.layout).astype(np.float32), np.array(HIGH))
    env, part = (PruningEnv(start, estimator.curves, objective, decider.layout, LOW, high) for high in (HIGH, PART))
    twin = Twin(estimator)

    def counted_twin(kept: torch.Tensor) -> torch.Tensor:
        objective.asked += len(kept)
        return twin(kept)

    check(env, lambda kept: twin(torch.from_numpy(kept).double()).numpy())
    learners: dict[str, tuple[Learner, PruningEnv]] = {
        "evolution strategy along the ratios (ours)": (evolution, env),
        "group-relative PPO": (network(group_relative), env),
        "stable-baselines3 PPO": (stable(ppo), env),
        "stable-baselines3 SAC": (stable(sac), env),
        "stable-baselines3 TD3": (stable(td3), env),
        "predictor's gradient": (network(lambda env, questions, seed: by_gradient(env, counted_twin, questions, seed)), env),
        f"ours, trained up to {PART:g} only": (evolution, part),
        f"group-relative PPO, trained up to {PART:g} only": (network(group_relative), part),
    }
    within = PART >= RATIOS
    possible, spent = judge(each_alone, env, objective, 0, arguments.seeds)
    found = {"search, each ratio alone": figures(possible, possible, within) | spent}
    for name, (learn, world) in learners.items():
        gains, spent = judge(learn, world, objective, arguments.questions, arguments.seeds)
        found[name] = figures(gains, possible, within) | spent
        print(f"{name}: {np.mean(found[name]['mean_gain']):.4f}, {np.mean(spent['seconds']):.0f} s", flush=True)
    result = {"study": Path(arguments.study).name, "questions": arguments.questions, "ratios": len(RATIOS), "part": PART}
    write("agents", 0, {**result, "learners": found})


def figures(gains: np.ndarray, possible: np.ndarray, within: np.ndarray) -> dict[str, list[float]]:
    """Per seed: gains over all ratios, up to ``PART`` and beyond; what is lacking to what search gains on average."""
    lacking = possible.mean(axis=0) - gains
    return {
        "mean_gain": rounded(gains.mean(axis=1)),
        "worst_gain": rounded(gains.min(axis=1)),
        "shortfall": rounded(lacking.mean(axis=1)),
        "worst_shortfall": rounded(lacking.max(axis=1)),
        "gain_up_to_part": rounded(gains[:, within].mean(axis=1)),
        "gain_beyond_part": rounded(gains[:, ~within].mean(axis=1)),
    }


if __name__ == "__main__":
    main()
