"""The pruning task as reinforcement learning, and a group-relative PPO for it.

Policy gradient with clipped importance weights (PPO, arXiv:1707.06347) and, in place of a critic, advantages relative to
a group of actions for the same ratio (GRPO, arXiv:2402.03300, section 4.1). Differs: one step an episode, so no
discount; the exploration noise shrinks on a schedule; no KL penalty, since the network starts where the policies do.
"""

from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import nn

from ppf.learn.agent import Agent
from ppf.learn.features import Curves
from ppf.learn.objective import Objective
from ppf.learn.process import NOISE
from ppf.learn.threads import one_thread
from ppf.space.allocation import allocate_many
from ppf.space.budget import removed
from ppf.space.layout import Layout


class PruningEnv(gymnasium.Env):
    """An episode is one decision: a correction of the start's keep-ratios; the budget is met by ``allocate``.

    The state is the wanted ratio, and per site what the start keeps and the root of its share of the damage. The reward is
    the logarithm of the start's damage over the policy's: 0 is as good as the start, 0.1 about 10 % less damage.

    Args:
        start: What is corrected.
        curves: Single-site damages.
        objective: Scores kept units.
        layout: Of the dense model.
        low, high: Range of ratios; those of the start's rows in it are asked for.
        reach: How far a site may be corrected, in keep-ratio.
    """

    def __init__(
        self, start: Agent, curves: Curves, objective: Objective, layout: Layout, low: float, high: float, reach: float = 1.0
    ) -> None:
        sites, bins = len(layout.sites), len(start.keep) - 1
        self.start, self.curves, self.objective, self.layout = start, curves, objective, layout
        self.low, self.high, self.ratios = low, high, np.arange(np.ceil(low * bins), np.floor(high * bins) + 1) / bins
        self.observation_space = spaces.Box(0.0, 1.0, (1 + 2 * sites,), np.float32)
        self.action_space = spaces.Box(-reach, reach, (sites,), np.float32)
        kept = start.kept(self.ratios, layout)
        damage = curves.damages(kept)
        share = np.sqrt(damage / (damage.sum(axis=1, keepdims=True) + NOISE))
        self.baseline = np.log(objective(kept) + NOISE)
        self.states = np.concatenate([self.ratios[:, None], kept / layout.units, share], axis=1).astype(np.float32)
        self.remove = np.array([removed(float(ratio), layout) for ratio in self.ratios], dtype=np.int64)
        self._place = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """A ratio of the range."""
        super().reset(seed=seed)
        self._place = int(self.np_random.integers(len(self.ratios)))
        return self.states[self._place].copy(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes the decision; the episode ends."""
        reward = self.rewards(np.array([self._place]), np.asarray(action)[None])[0]
        return self.states[self._place].copy(), float(reward), True, False, {}

    def rewards(self, places: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Float[N], of Int[N] places among ``ratios`` and Float[N, S] corrections."""
        wishes = self.start.keep[self.start.rows(self.ratios[places])] + actions
        kept = allocate_many(wishes, self.remove[places], self.layout)
        return self.baseline[places] - np.log(self.objective(kept) + NOISE)

    def states_of(self, ratios: np.ndarray) -> np.ndarray:
        """Float[N, 1 + 2 S]: the states of any ratios, those beyond the range as its last."""
        return self.states[np.clip(np.searchsorted(self.ratios, ratios - 1e-9), 0, len(self.ratios) - 1)]

    def places(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Int[count]: one from each of as many equal strata."""
        return ((np.arange(count) + rng.random(count)) / count * len(self.ratios)).astype(np.int64)


@dataclass(frozen=True)
class GroupConfig:
    """How the group-relative learner learns.

    Attributes:
        ratios: Ratios a round.
        group: Actions a ratio.
        epochs: Gradient steps a round.
        learning_rate: Of Adam, falling to a tenth.
        clip_coef: How far the probability ratio may move.
        noise: Standard deviation of the action at the start and at the end, in keep-ratio.
    """

    ratios: int = 16
    group: int = 32
    epochs: int = 4
    learning_rate: float = 3e-3
    clip_coef: float = 0.2
    noise: tuple[float, float] = (0.15, 0.01)


@one_thread()
def group_relative(env: PruningEnv, questions: int, seed: int, config: GroupConfig = GroupConfig()) -> nn.Module:
    """Trains a network from states to corrections."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    network = small_network(env, generator)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    rounds = questions // (config.ratios * config.group)
    for round in range(rounds):
        done = round / max(rounds - 1, 1)
        std = config.noise[0] * (config.noise[1] / config.noise[0]) ** done
        optimiser.param_groups[0]["lr"] = config.learning_rate * 0.1**done
        places = env.places(config.ratios, rng)
        states = torch.from_numpy(env.states[places])
        means = network(states).detach()
        actions = means[:, None] + std * torch.randn((len(places), config.group, means.shape[1]), generator=generator)
        tried = actions.reshape(-1, means.shape[1]).numpy()
        rewards = torch.from_numpy(env.rewards(np.repeat(places, config.group), tried)).float().reshape(actions.shape[:2])
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        _learn(network, optimiser, states, actions, advantages, std, config)
    return network


def small_network(env: PruningEnv, generator: torch.Generator, hidden: int = 64) -> nn.Sequential:
    """Two hidden layers; the last is empty, so that the first policy is the start."""
    inputs, outputs = env.observation_space.shape[0], env.action_space.shape[0]
    layers = [nn.Linear(*size) for size in ((inputs, hidden), (hidden, hidden), (hidden, outputs))]
    for layer in layers[:2]:
        nn.init.orthogonal_(layer.weight, gain=2**0.5, generator=generator)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(layers[2].weight)
    nn.init.zeros_(layers[2].bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def _learn(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    states: torch.Tensor,
    actions: torch.Tensor,
    advantages: torch.Tensor,
    std: float,
    config: GroupConfig,
) -> None:
    with torch.no_grad():
        old = _log_density(network(states), actions, std)
    for _ in range(config.epochs):
        weight = (_log_density(network(states), actions, std) - old).exp()
        clipped = weight.clamp(1 - config.clip_coef, 1 + config.clip_coef)
        loss = -torch.minimum(weight * advantages, clipped * advantages).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimiser.step()


def _log_density(means: torch.Tensor, actions: torch.Tensor, std: float) -> torch.Tensor:
    """Float[R, G], up to a constant."""
    return -((actions - means[:, None]) ** 2).sum(-1) / (2 * std**2)
