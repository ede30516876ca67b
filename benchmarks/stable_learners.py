"""PPO, SAC and TD3 of stable-baselines3 on the pruning task. An episode is one step, so discount and targets play no part.

All start from the start's policies: the last layer of each actor is empty at first.
"""

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from stable_baselines3 import PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.noise import NormalActionNoise, VectorizedActionNoise
from stable_baselines3.common.vec_env import VecEnv

from ppf.learn.threads import one_thread
from reinforcement import PruningEnv

WIDTH, REACH = 64, 0.3
_STEPS = 5
"""Gradient steps of SAC and TD3 after each ``WIDTH`` questions: two minutes at most for 150,000."""


class SideBySide(VecEnv):
    """So many episodes of one environment at a time: the objective is asked for all of them at once."""

    def __init__(self, env: PruningEnv, reach: float, seed: int) -> None:
        self.env, self.rng = env, np.random.default_rng(seed)
        super().__init__(WIDTH, env.observation_space, spaces.Box(-reach, reach, env.action_space.shape, np.float32))

    def reset(self) -> np.ndarray:
        self.places = self.env.places(WIDTH, self.rng)
        return self.env.states[self.places]

    def step_async(self, actions: np.ndarray) -> None:
        self.actions = actions

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        rewards, last = self.env.rewards(self.places, self.actions), self.env.states[self.places]
        infos = [{"terminal_observation": state, "TimeLimit.truncated": False} for state in last]
        return self.reset(), rewards.astype(np.float32), np.ones(WIDTH, dtype=bool), infos

    def close(self) -> None: ...

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name, None)] * WIDTH

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        setattr(self.env, attr_name, value)

    def env_method(self, method_name: str, *arguments: Any, indices: Any = None, **named: Any) -> list[Any]:
        return [getattr(self.env, method_name)(*arguments, **named)] * WIDTH

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * WIDTH


@one_thread()
def ppo(env: PruningEnv, questions: int, seed: int) -> BaseAlgorithm:
    """Large batches and a small initial noise, which it needs here to learn at all."""
    model = PPO(
        "MlpPolicy", SideBySide(env, 1.0, seed), n_steps=16, batch_size=256, n_epochs=4, learning_rate=_falling, gamma=1.0,
        ent_coef=0.0, seed=seed, device="cpu", policy_kwargs={"log_std_init": float(np.log(0.1)), "net_arch": [64, 64]},
    )  # fmt: skip
    _empty(model.policy.action_net)
    return model.learn(questions)


@one_thread()
def sac(env: PruningEnv, questions: int, seed: int) -> BaseAlgorithm:
    """Soft actor-critic; the temperature begins small, as the rewards are, and so does the noise."""
    model = SAC("MlpPolicy", SideBySide(env, REACH, seed), ent_coef="auto_0.001", **_off_policy(questions, seed))
    _empty(model.actor.mu)
    _empty(model.actor.log_std, -1.5)
    return model.learn(questions)


@one_thread()
def td3(env: PruningEnv, questions: int, seed: int) -> BaseAlgorithm:
    """TD3; its noise is a few per cent of keep-ratio."""
    sites = env.action_space.shape[0]
    noise = VectorizedActionNoise(NormalActionNoise(np.zeros(sites), np.full(sites, 0.15)), WIDTH)
    model = TD3("MlpPolicy", SideBySide(env, REACH, seed), action_noise=noise, **_off_policy(questions, seed))
    _empty(model.actor.mu[-2])
    model.actor_target.load_state_dict(model.actor.state_dict())
    return model.learn(questions)


def _off_policy(questions: int, seed: int) -> dict[str, Any]:
    return {
        "learning_rate": _falling, "buffer_size": questions, "learning_starts": min(1024, questions // 4), "batch_size": 256,
        "train_freq": 1, "gradient_steps": _STEPS, "gamma": 0.0, "seed": seed, "device": "cpu",
        "policy_kwargs": {"net_arch": {"pi": [64, 64], "qf": [128, 128]}},
    }  # fmt: skip


def _falling(left: float) -> float:
    """Learning rate by the share of training that is left; it falls to a tenth."""
    return 1e-3 * 0.1 ** (1 - left)


def _empty(layer: torch.nn.Linear, bias: float = 0.0) -> None:
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.constant_(layer.bias, bias)
