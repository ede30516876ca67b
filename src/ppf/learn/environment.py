"""The pruning task as reinforcement learning: one step. The state is the wanted ratio and what the prior does there."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from ppf.learn.agent import Prior, prior_kept
from ppf.learn.objective import Objective
from ppf.learn.predictor import NOISE
from ppf.space.allocation import allocate_many
from ppf.space.budget import removed
from ppf.space.layout import Layout


class PruningEnv(gymnasium.Env):
    """An episode is one decision: a correction of the prior's keep-ratios; the budget is met by ``allocate``.

    The reward is the logarithm of the prior's damage over the policy's: 0 is as good as the prior, 0.1 about 10 % less
    damage. It compares ratios on one scale.

    Args:
        prior: What is corrected.
        objective: Scores kept units.
        layout: Of the dense model.
        low, high: Range of ratios.
    """

    def __init__(self, prior: Prior, objective: Objective, layout: Layout, low: float, high: float) -> None:
        sites = len(layout.sites)
        self.prior, self.objective, self.layout, self.low, self.high = prior, objective, layout, low, high
        self.observation_space = spaces.Box(0.0, 1.0, (1 + 2 * sites,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (sites,), np.float32)
        self._ratio = low

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """A ratio, uniform in the range, or ``options["ratio"]``."""
        super().reset(seed=seed)
        self._ratio = (options or {}).get("ratio", self.np_random.uniform(self.low, self.high))
        return self.prior.state(np.array([self._ratio]))[0], {"ratio": self._ratio}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes the decision; the episode ends."""
        ratios = np.array([self._ratio])
        reward = self.rewards(ratios, np.asarray(action)[None], self.baseline(ratios))[0]
        return self.prior.state(ratios)[0], float(reward), True, False, {"ratio": self._ratio}

    def baseline(self, ratios: np.ndarray) -> np.ndarray:
        """Float[N]: log(damage + e) of the prior."""
        kept = prior_kept(self.prior, ratios, self.removed(ratios), self.layout)
        return np.log(self.objective(kept) + NOISE)

    def rewards(self, ratios: np.ndarray, actions: np.ndarray, baseline: np.ndarray) -> np.ndarray:
        """Float[N], of Float[N] ratios, Float[N, S] corrections and their ratios' ``baseline``."""
        wishes = self.prior.keep[self.prior.rows(ratios)] + actions
        kept = allocate_many(wishes, self.removed(ratios), self.layout)
        return baseline - np.log(self.objective(kept) + NOISE)

    def removed(self, ratios: np.ndarray) -> np.ndarray:
        """Int[N]: parameters that must go."""
        return np.array([removed(float(ratio), self.layout) for ratio in ratios], dtype=np.int64)
