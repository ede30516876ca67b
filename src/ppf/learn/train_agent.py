"""Training the agent on the predictor's feedback, over the whole range of ratios at once.

Policy gradient with clipped importance weights (PPO, arXiv:1707.06347) and, in place of a critic, advantages relative to
a group of actions for the same ratio (GRPO, arXiv:2402.03300, section 4.1). Differs: one step an episode, so no
discount; the exploration noise shrinks on a schedule; no KL penalty, since the prior is where the network starts.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ppf.learn.agent import Agent, Prior
from ppf.learn.environment import PruningEnv
from ppf.learn.objective import Objective
from ppf.learn.threads import one_thread
from ppf.space.layout import Layout


@dataclass(frozen=True)
class AgentConfig:
    """How the agent is trained.

    Attributes:
        iterations: Rounds of acting and learning.
        ratios: Ratios a round, one from each of as many equal strata.
        group: Actions a ratio.
        epochs: Gradient steps a round.
        hidden: Width of both hidden layers.
        learning_rate: Of Adam, falling to a tenth.
        clip_coef: How far the probability ratio may move.
        noise: Standard deviation of the action at the start and at the end, in keep-ratio.
    """

    iterations: int = 800
    ratios: int = 16
    group: int = 32
    epochs: int = 4
    hidden: int = 64
    learning_rate: float = 3e-3
    clip_coef: float = 0.2
    noise: tuple[float, float] = (0.15, 0.01)


@one_thread()
def train_agent(
    prior: Prior,
    objective: Objective,
    layout: Layout,
    low: float,
    high: float,
    seed: int,
    config: AgentConfig = AgentConfig(),
    advance: Callable[[float], None] = lambda reward: None,
) -> Agent:
    """Trains an agent.

    Args:
        prior: What it corrects.
        objective: Scores kept units.
        layout: Of the dense model.
        low, high: Range of ratios.
        seed: Of weights, ratios and actions.
        config: See ``AgentConfig``.
        advance: Told the mean reward of each round's actions without noise.
    """
    env = PruningEnv(prior, objective, layout, low, high)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    network = _network(env, config.hidden, generator)
    optimiser = torch.optim.Adam(network.parameters(), lr=config.learning_rate)
    for iteration in range(config.iterations):
        done = iteration / max(config.iterations - 1, 1)
        std = config.noise[0] * (config.noise[1] / config.noise[0]) ** done
        optimiser.param_groups[0]["lr"] = config.learning_rate * 0.1**done
        ratios = low + (high - low) * (np.arange(config.ratios) + rng.random(config.ratios)) / config.ratios
        states = torch.from_numpy(prior.state(ratios))
        actions, rewards = _act(env, network(states).detach(), ratios, std, config.group, generator)
        advantages = _advantages(rewards[:, 1:])
        advance(float(rewards[:, 0].mean()))
        _learn(network, optimiser, states, actions, advantages, std, config)
    return _frozen(network, prior, high)


def _network(env: PruningEnv, hidden: int, generator: torch.Generator) -> nn.Sequential:
    inputs, outputs = env.observation_space.shape[0], env.action_space.shape[0]
    sizes = [(inputs, hidden), (hidden, hidden), (hidden, outputs)]
    layers = [nn.utils.skip_init(nn.Linear, *size) for size in sizes]  # its own start would draw from torch's global generator
    for layer in layers[:2]:
        nn.init.orthogonal_(layer.weight, gain=2**0.5, generator=generator)
        nn.init.zeros_(layer.bias)
    nn.init.zeros_(layers[2].weight)  # the first policy is the prior itself
    nn.init.zeros_(layers[2].bias)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1], nn.Tanh(), layers[2])


def _act(
    env: PruningEnv, means: torch.Tensor, ratios: np.ndarray, std: float, group: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions Float[R, group, S] and rewards Float[R, 1 + group]; the first reward is that of the mean."""
    actions = means[:, None] + std * torch.randn((len(ratios), group, means.shape[1]), generator=generator)
    tried = torch.cat([means[:, None], actions], dim=1).numpy()
    repeated: np.ndarray = np.repeat(ratios, group + 1)
    baseline: np.ndarray = np.repeat(env.baseline(ratios), group + 1)
    rewards = env.rewards(repeated, tried.reshape(len(repeated), -1), baseline).reshape(len(ratios), group + 1)
    return actions, torch.from_numpy(rewards).float()


def _advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Float[R, G]: each group's rewards, centred and scaled."""
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def _learn(
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    states: torch.Tensor,
    actions: torch.Tensor,
    advantages: torch.Tensor,
    std: float,
    config: AgentConfig,
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


def _frozen(network: nn.Sequential, prior: Prior, max_ratio: float) -> Agent:
    arrays = {}
    for number, layer in enumerate((network[0], network[2], network[4]), 1):
        arrays[f"weight{number}"] = layer.weight.detach().T.numpy().copy()
        arrays[f"bias{number}"] = layer.bias.detach().numpy().copy()
    return Agent(prior.keep, prior.damage, **arrays, max_ratio=np.array(max_ratio))
