"""The agent: from a wanted ratio to a policy in microseconds. Inference alone, in numpy.

It is a table with a policy for every thousandth of the prunable parameters. Training fills it on the predictor's feedback,
for all ratios at once (train_agent.py). What is wanted between two rows takes the row that removes more.
"""

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ppf.artifact import load_artifact, save_artifact
from ppf.errors import MEND, DamagedError
from ppf.space.allocation import allocate_many
from ppf.space.budget import removed
from ppf.space.layout import Layout
from ppf.space.policy import Policy


@dataclass(frozen=True, eq=False)
class Agent:
    """A policy for every ratio.

    Attributes:
        keep: Float[B + 1, S], row b: wished keep-ratios when the share b / B of the prunable parameters goes.
        max_ratio: Float[], the largest ratio that it was trained on; rows beyond are those of the additive optimum.
    """

    keep: np.ndarray
    max_ratio: np.ndarray

    def propose(self, ratio: float) -> Policy:
        """The policy for a ratio in [0, 1)."""
        return Policy(self.keep[self.rows(np.array([ratio]))[0]])

    def rows(self, ratios: np.ndarray) -> np.ndarray:
        """Int[N]: the row of each ratio in [0, 1), the next larger one; up to ``max_ratio`` a row that was trained."""
        bins, ratios = len(self.keep) - 1, np.asarray(ratios)
        trained = np.where(ratios <= self.max_ratio + 1e-9, np.floor(self.max_ratio * bins + 1e-9), bins)
        return np.minimum(np.ceil(ratios * bins - 1e-9), trained).astype(np.int64)

    def kept(self, ratios: np.ndarray, layout: Layout) -> np.ndarray:
        """Int[N, S]: what stays at each of Float[N] ratios."""
        remove = np.array([removed(float(ratio), layout) for ratio in ratios], dtype=np.int64)
        return allocate_many(self.keep[self.rows(ratios)], remove, layout)

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
            raise DamagedError(f"{path} must hold an agent; {error}; {MEND}") from error
