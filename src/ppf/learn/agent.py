"""The agent: from a wanted ratio to a policy in well under a millisecond. Inference alone, in numpy.

ratio ── prior policy of that ratio (additive knapsack) ── network ── correction ── prior + correction = Policy
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ppf.artifact import load_artifact, save_artifact
from ppf.errors import DamagedError
from ppf.learn.features import Curves
from ppf.learn.predictor import NOISE
from ppf.space.allocation import allocate_many
from ppf.space.layout import Layout
from ppf.space.policy import Policy


@dataclass(frozen=True, eq=False)
class Prior:
    """A policy for every ratio, and what the agent sees there.

    Attributes:
        keep: Float[B + 1, S], wished keep-ratios when the share b / B goes.
        damage: Float[B + 1, S], single-site damages there, nats/token.
    """

    keep: np.ndarray
    damage: np.ndarray

    @classmethod
    def of(cls, keep: np.ndarray, curves: Curves) -> "Prior":
        """From wished keep-ratios and the curves that say what they do."""
        kept = np.rint(keep * curves.units).astype(np.int64)
        return cls(keep.astype(np.float32), curves.damages(kept).astype(np.float32))

    def rows(self, ratios: np.ndarray) -> np.ndarray:
        """Int[N]: the row of each ratio in [0, 1), the next larger one."""
        bins = len(self.keep) - 1
        return np.minimum(np.ceil(np.asarray(ratios) * bins - 1e-9).astype(np.int64), bins)

    def state(self, ratios: np.ndarray) -> np.ndarray:
        """Float[N, 1 + 2 S]: per ratio the ratio, and per site its prior keep-ratio and its share of the damage, as a root."""
        rows = self.rows(ratios)
        damage = self.damage[rows]
        share = np.sqrt(damage / (damage.sum(axis=1, keepdims=True) + NOISE))
        return np.concatenate([np.asarray(ratios)[:, None], self.keep[rows], share], axis=1).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Agent:
    """A trained policy network around a prior.

    Attributes:
        keep: As in ``Prior``.
        damage: As in ``Prior``.
        weight1, bias1, weight2, bias2: Hidden layers, tanh.
        weight3, bias3: Output, Float[hidden, S] and Float[S]: the correction of the keep-ratio.
        max_ratio: Float[], the largest ratio that it was trained on.
    """

    keep: np.ndarray
    damage: np.ndarray
    weight1: np.ndarray
    bias1: np.ndarray
    weight2: np.ndarray
    bias2: np.ndarray
    weight3: np.ndarray
    bias3: np.ndarray
    max_ratio: np.ndarray

    @property
    def prior(self) -> Prior:
        """What it corrects."""
        return Prior(self.keep, self.damage)

    def propose(self, ratio: float) -> Policy:
        """The policy for a ratio in [0, 1); beyond ``max_ratio`` the correction is that of ``max_ratio``."""
        return Policy(self.keep[self.prior.rows(np.array([ratio]))[0]] + self.correction(np.array([ratio]))[0])

    def correction(self, ratios: np.ndarray) -> np.ndarray:
        """Float[N, S], of Float[N] ratios."""
        state = self.prior.state(np.minimum(ratios, self.max_ratio))
        hidden = np.tanh(np.tanh(state @ self.weight1 + self.bias1) @ self.weight2 + self.bias2)
        return hidden @ self.weight3 + self.bias3

    def save(self, path: Path, layout: Layout) -> None:
        """Writes the artefact."""
        save_artifact(path, "agent", layout.fingerprint, {field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def load(cls, path: Path, layout: Layout) -> "Agent":
        """Reads the artefact.

        Raises:
            DamagedError: Not whole, or of another model.
        """
        arrays, _ = load_artifact(path, "agent", layout.fingerprint)
        try:
            return cls(**arrays)
        except TypeError as error:
            raise DamagedError(f"{path} must hold an agent; {error}; fit the study again") from error


def prior_kept(prior: Prior, ratios: np.ndarray, remove: np.ndarray, layout: Layout) -> np.ndarray:
    """Int[N, S]: what the prior alone keeps at each ratio."""
    return allocate_many(prior.keep[prior.rows(ratios)], remove, layout)
