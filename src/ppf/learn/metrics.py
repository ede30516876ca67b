"""How good a predictor is, above all among masks of one size, where search needs it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import kendalltau

from ppf.learn.predictor import Predictor
from ppf.samples import Sample, kept_matrix
from ppf.space.layout import Layout


@dataclass(frozen=True)
class Figures:
    """A predictor's errors on samples that it was not fitted to.

    Attributes:
        count: Samples.
        mse: Mean squared error on the scale PPL_dense / PPL, in [0, 1].
        mae: Mean absolute error of the log-perplexity, nats/token.
        mae_damage: Mean absolute error of the damage, nats/token.
        tau: Kendall's tau-b of predicted against measured damage, all samples together.
        tau_within: The same among the samples of each nominal ratio.
        tau_log_ppl_within: Predicted damage against measured log-perplexity, which is the noisier of the two.
        z: Root mean square of error over predicted standard deviation of the damage; 1 is calibrated.
    """

    count: int
    mse: float
    mae: float
    mae_damage: float
    tau: float
    tau_within: dict[str, float]
    tau_log_ppl_within: dict[str, float]
    z: float

    @property
    def tau_mean(self) -> float:
        """Mean of ``tau_within`` over the ratios."""
        return float(np.mean(list(self.tau_within.values()))) if self.tau_within else 0.0


def figures(predictor: Predictor, samples: Sequence[Sample], layout: Layout, dense_log_ppl: float) -> Figures:
    """Compares predictions with measurements.

    Args:
        predictor: Not fitted to ``samples``.
        samples: Finished ones, at least two.
        layout: Of the dense model.
        dense_log_ppl: Of the dense model on the text on which the samples were measured.
    """
    predicted = predictor.predict(kept_matrix(list(samples), layout))
    damage = np.array([sample.kl for sample in samples])
    log_ppl = np.array([sample.log_ppl for sample in samples]) - dense_log_ppl
    groups = {f"{ratio:g}": np.array([s.ratio == ratio for s in samples]) for ratio in sorted({s.ratio for s in samples})}
    groups = {name: rows for name, rows in groups.items() if rows.sum() > 1}
    return Figures(
        len(samples),
        float(((np.exp(-predicted.log_ppl) - np.exp(-log_ppl)) ** 2).mean()),
        float(np.abs(predicted.log_ppl - log_ppl).mean()),
        float(np.abs(predicted.damage - damage).mean()),
        tau(predicted.damage, damage),
        {name: tau(predicted.damage[rows], damage[rows]) for name, rows in groups.items()},
        {name: tau(predicted.damage[rows], log_ppl[rows]) for name, rows in groups.items()},
        float(np.sqrt((((predicted.damage - damage) / np.maximum(predicted.std, 1e-9)) ** 2).mean())),
    )


def tau(first: np.ndarray, second: np.ndarray) -> float:
    """Kendall's tau-b in [-1, 1]; 0 where one side is constant."""
    value = kendalltau(first, second).statistic
    return float(value) if np.isfinite(value) else 0.0


def tau_near(predicted: np.ndarray, truth: np.ndarray, ratios: np.ndarray, width: float = 0.03) -> float:
    """Kendall's tau-a over the pairs of masks whose ratios differ by at most ``width``; 0 where there is no pair."""
    first, second = np.triu_indices(len(ratios), 1)
    near = np.abs(ratios[first] - ratios[second]) <= width
    first, second = first[near], second[near]
    agree = np.sign(predicted[first] - predicted[second]) * np.sign(truth[first] - truth[second])
    return float(agree.mean()) if len(agree) else 0.0
