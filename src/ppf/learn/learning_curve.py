"""How a predictor came to know: its error on masks that it never saw, by the number of samples that it had seen."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ppf.learn.metrics import figures
from ppf.learn.predictor import Corrected, Predictor
from ppf.samples import Sample
from ppf.space.layout import Layout

_FEWEST, _STEPS = 4, 14


@dataclass(frozen=True)
class Known:
    """A predictor that had seen only some of its samples.

    Attributes:
        samples: How many masks besides the probes.
        mae_damage: As in ``Figures``.
        tau_mean: As in ``Figures``.
    """

    samples: int
    mae_damage: float
    tau_mean: float


def learning_curve(predictor: Predictor, samples: Sequence[Sample], layout: Layout, dense_log_ppl: float) -> list[Known]:
    """Errors as samples came in, in the order in which the rounds measured them.

    Nothing is fitted again: the single-site curves and the hyperparameters of the process are those of the whole fit.

    Args:
        predictor: A fitted one.
        samples: Held-out ones, at least two.
        layout: Of the dense model.
        dense_log_ppl: Of the dense model on the text of the samples, nats/token.

    Returns:
        From few samples to all of them; empty for an estimator that does not know its samples one by one.
    """
    estimator = predictor.estimator
    if not isinstance(estimator, Corrected):
        return []
    most = estimator.seen - 1  # the first one is the dense model
    known = []
    for count in np.unique(np.geomspace(min(_FEWEST, most), most, _STEPS).round().astype(int)).tolist():
        found = figures(replace(predictor, estimator=estimator.first(count + 1)), samples, layout, dense_log_ppl)
        known.append(Known(count, found.mae_damage, found.tau_mean))
    return known
