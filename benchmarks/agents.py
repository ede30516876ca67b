"""Which reinforcement learner makes the better agent, for the same number of questions to the predictor?

Ours (group-relative PPO, single file) against PPO of stable-baselines3 on the same Gymnasium environment, both from the
same prior. Score: mean over 25 ratios of log(damage of the prior / damage of the policy) under the predictor, so 0 is the
prior and 0.1 is about 10 % less damage; the search row shows what is possible at each ratio alone.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from pathlib import Path

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from ppf.decide import Decider
from ppf.learn.environment import PruningEnv
from ppf.learn.objective import predicted
from ppf.learn.predictor import NOISE
from ppf.learn.search import refine
from ppf.learn.train_agent import AgentConfig, train_agent
from record import write

LOW, HIGH = 0.02, 0.65
RATIOS = np.linspace(0.03, 0.64, 25)


def ours(env: PruningEnv, questions: int, seed: int) -> np.ndarray:
    config = AgentConfig()
    iterations = questions // (config.ratios * (config.group + 1))
    agent = train_agent(env.prior, env.objective, env.layout, LOW, HIGH, seed, AgentConfig(iterations=iterations))
    return agent.correction(RATIOS)


def stable_baselines(env: PruningEnv, questions: int, seed: int) -> np.ndarray:
    """PPO with one-step episodes; large batches and a small initial noise, which it needs here to learn at all."""
    envs = make_vec_env(lambda: PruningEnv(env.prior, env.objective, env.layout, LOW, HIGH), n_envs=16, seed=seed)
    policy = {"log_std_init": float(np.log(0.1)), "net_arch": [64, 64]}
    model = PPO(
        "MlpPolicy", envs, n_steps=64, batch_size=256, n_epochs=4, learning_rate=1e-3, gamma=1.0, ent_coef=0.0, seed=seed,
        device="cpu", policy_kwargs=policy,
    )  # fmt: skip
    model.learn(total_timesteps=questions)
    return model.predict(env.prior.state(RATIOS), deterministic=True)[0]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", default="runs/demo")
    parser.add_argument("--questions", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    decider = Decider(arguments.study)
    env = PruningEnv(decider.agent.prior, predicted(decider.predictor), decider.layout, LOW, HIGH)
    baseline = env.baseline(RATIOS)
    found = {}
    for name, learn in (("ours", ours), ("stable-baselines3 PPO", stable_baselines)):
        gains, seconds = [], []
        for seed in range(arguments.seeds):
            start = time.perf_counter()
            corrections = learn(env, arguments.questions, seed)
            seconds.append(round(time.perf_counter() - start, 1))
            gains.append(env.rewards(RATIOS, corrections, baseline))
        found[name] = {
            "mean_gain": [round(float(gain.mean()), 4) for gain in gains],
            "worst_gain": [round(float(gain.min()), 4) for gain in gains],
            "seconds": seconds,
        }
    rng = np.random.default_rng(0)
    searched = []
    for ratio, before in zip(RATIOS, baseline, strict=True):
        start = env.prior.keep[env.prior.rows(np.array([ratio]))]
        _, scores = refine(env.objective, start, int(env.removed(np.array([ratio]))[0]), env.layout, 80, rng)
        searched.append(before - np.log(scores[0] + NOISE))
    found["search, each ratio alone"] = {"mean_gain": [round(float(np.mean(searched)), 4)]}
    write(
        "agents",
        0,
        {"study": Path(arguments.study).name, "questions": arguments.questions, "ratios": len(RATIOS), "learners": found},
    )


if __name__ == "__main__":
    main()
