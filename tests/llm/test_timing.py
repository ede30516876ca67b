import time

import numpy as np

import tiny_models as tiny
from builders import importance
from ppf.llm.architectures import layout_of_model
from ppf.llm.elastic import ElasticModel
from ppf.llm.timing import step_seconds
from ppf.space.allocation import Allocation


def test_every_size_is_timed_and_the_slow_one_is_slower(monkeypatch):
    model = tiny.model("llama-mha")
    elastic = ElasticModel(model, layout_of_model(model), importance(layout_of_model(model)))
    small, large = elastic.view(Allocation(elastic.layout.floors)), elastic.view(Allocation(np.array(elastic.layout.units)))
    forward = type(model).forward

    def slow(self, *args, **kwargs):
        time.sleep(0.02 if elastic._running.view is large else 0)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", slow)
    start = time.perf_counter()
    fast, slow_one = step_seconds(elastic, [small, large], 0.0)
    assert 0 < fast < slow_one and slow_one > 0.02
    assert time.perf_counter() - start < 5
