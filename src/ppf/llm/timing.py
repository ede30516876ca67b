"""How long a token takes at several sizes of an elastic model."""

import statistics
import time
from collections.abc import Sequence

import torch
from transformers import DynamicCache

from ppf.llm.elastic import ElasticModel
from ppf.llm.prefix import View

_PROMPT = 16
_STEPS = 4
_ROUNDS = (1, 8)


def step_seconds(elastic: ElasticModel, views: Sequence[View], seconds: float) -> list[float]:
    """Median seconds of one token behind a short prompt, at each view; the views take turns, so that other load meets all.

    Args:
        elastic: The model.
        views: Where to time it.
        seconds: About how long timing may take; each view is timed once in any case.
    """
    times: list[list[float]] = [[] for _ in views]
    _steps(elastic, views[0])  # the first run of a process allocates and loads
    end = time.perf_counter() + seconds
    for number in range(_ROUNDS[1]):
        if number >= _ROUNDS[0] and time.perf_counter() > end:
            break
        for view, found in zip(views, times, strict=True):
            found += _steps(elastic, view)
    return [statistics.median(found) for found in times]


@torch.inference_mode()
def _steps(elastic: ElasticModel, view: View) -> list[float]:
    ids = torch.ones((1, _PROMPT), dtype=torch.long, device=elastic.device)
    cache, times = DynamicCache(config=elastic.config), list[float]()
    with elastic.at(view) as model:
        model(input_ids=ids, past_key_values=cache, use_cache=True)
        for _ in range(_STEPS):
            start = time.perf_counter()
            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).logits[0, -1, 0].item()
            times.append(time.perf_counter() - start)
    return times
