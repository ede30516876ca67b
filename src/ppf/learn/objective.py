"""Objective: allocations in, damage out. Whoever searches need not know whether it was predicted or measured."""

from collections.abc import Callable

import numpy as np

from ppf.learn.predictor import Predictor

Objective = Callable[[np.ndarray], np.ndarray]
"""Int[N, S] kept units -> Float[N] damage, nats/token; lower is better."""

CAUTION = 0.5
"""Standard deviations that are added to a predicted damage: a search must not live on a predictor's errors."""


def predicted(predictor: Predictor, caution: float = CAUTION) -> Objective:
    """Damage as predicted, plus ``caution`` times its standard deviation."""

    def objective(kept: np.ndarray) -> np.ndarray:
        damage, std = predictor.estimator.estimate(kept)
        return damage + caution * std

    return objective
