import math
from contextlib import closing

import numpy as np
import pytest

import tiny_models as tiny
from builders import random_mask
from ppf.llm.architectures import layout_of_model
from ppf.llm.engines import InProcessEngine, measure_mask
from ppf.llm.perplexity import reference_of
from ppf.space.mask import Mask

BLOCKS = tiny.blocks(6, 12)


def masks(count, of):
    return [random_mask(of, seed) for seed in range(count)]


def test_in_this_process_masks_are_answered_in_order():
    model = tiny.model()
    of = layout_of_model(model)
    wanted, before = masks(5, of), tiny.snapshot(model)
    with closing(InProcessEngine(model, of, BLOCKS, 4096)) as engine:
        found = list(engine.measure(wanted))
    assert [index for index, _ in found] == list(range(5)) and tiny.snapshot(model) == before
    reference = reference_of(model, BLOCKS)
    for index, result in found:
        alone = measure_mask(model, of, wanted[index], BLOCKS, reference, 24)
        assert (result.log_ppl, result.kl) == pytest.approx((alone.log_ppl, alone.kl), abs=1e-6)
    assert len({result.log_ppl for _, result in found}) == 5 and all(result.kl > 0 for _, result in found)
    everything = Mask(tuple(np.ones(units, dtype=bool) for units in of.units))
    assert abs(measure_mask(model, of, everything, BLOCKS, reference, 4096).kl) < 1e-7


def test_too_little_memory_is_a_result_with_a_reason():
    model = tiny.model()
    of = layout_of_model(model)
    engine, wanted = InProcessEngine(model, of, BLOCKS, 4096), masks(3, of)
    calls = []

    def full_once(*_):
        calls.append(1)
        if len(calls) <= 4:  # one mask's: the batch and its halves, down to one block
            raise MemoryError

    model.register_forward_pre_hook(full_once)
    found = [result for _, result in engine.measure(wanted)]
    assert math.isnan(found[0].log_ppl) and "memory" in found[0].reason
    assert [result.reason for result in found[1:]] == ["", ""]
    assert len(tiny.snapshot(model)["hooks"]) == 1
