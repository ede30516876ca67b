import math
from contextlib import closing
from functools import partial

import numpy as np
import pytest

import tiny_models as tiny
from builders import random_mask
from ppf.llm import masking
from ppf.llm.architectures import layout_of_model
from ppf.llm.engines import bench
from ppf.llm.engines.bench import InProcessEngine
from ppf.llm.masking import masked, narrowed
from ppf.llm.perplexity import evaluate
from ppf.llm.surgery import cut_site
from ppf.llm.text import Text
from ppf.space.mask import Mask

BLOCKS, OTHERS = tiny.blocks(6, 12), tiny.blocks(4, 12, seed=5)
TEXT = Text("t", BLOCKS, BLOCKS, BLOCKS[:0], OTHERS)


def masks(count, of):
    return [random_mask(of, seed) for seed in range(count)]


def test_in_this_process_masks_are_answered_in_order():
    model = tiny.model()
    of = layout_of_model(model)
    wanted, before = masks(5, of), tiny.snapshot(model)
    with closing(InProcessEngine(model, of, TEXT, 4096)) as engine:
        found = list(engine.measure(wanted))
    assert [index for index, _ in found] == list(range(5)) and tiny.snapshot(model) == before
    for index, result in found:
        with masked(model, of, wanted[index]):
            alone = evaluate(model, BLOCKS, 24)
        assert result.log_ppl == pytest.approx(alone.log_ppl, abs=1e-6) and result.losses == pytest.approx(alone.blocks, abs=1e-6)
        assert result.kl == pytest.approx(np.mean(result.divergences)) and len(result.divergences) == len(BLOCKS)
    assert len({result.log_ppl for _, result in found}) == 5 and all(result.kl > 0 for _, result in found)


def test_the_dense_model_has_no_damage_on_either_part():
    model = tiny.model()
    of = layout_of_model(model)
    everything = Mask(tuple(np.ones(units, dtype=bool) for units in of.units))
    engine = InProcessEngine(model, of, TEXT, 4096)
    for part, blocks in (("search", BLOCKS), ("test", OTHERS)):
        ((_, result),) = engine.measure([everything], part)
        assert abs(result.kl) < 1e-7 and result.tokens == blocks.size
        assert result.losses == pytest.approx(evaluate(model, blocks).blocks, abs=1e-6)


def test_some_rows_give_the_figures_of_these_blocks():
    model = tiny.model()
    of = layout_of_model(model)
    engine, wanted = InProcessEngine(model, of, TEXT, 4096), masks(2, of)
    whole = dict(engine.measure(wanted, "test"))
    for index, result in engine.measure(wanted, "test", [3, 1]):
        assert result.losses == pytest.approx([whole[index].losses[row] for row in (3, 1)], abs=1e-6)
        assert result.divergences == pytest.approx([whole[index].divergences[row] for row in (3, 1)], abs=1e-6)
        assert result.tokens == 2 * 12


def test_too_little_memory_is_a_result_with_a_reason():
    model = tiny.model()
    of = layout_of_model(model)
    engine, wanted = InProcessEngine(model, of, TEXT, 4096), masks(3, of)
    calls = []

    def full_once(*_):
        calls.append(1)
        if len(calls) <= 4:  # one mask's: the batch and its halves, down to one block
            raise MemoryError

    model.base_model.register_forward_pre_hook(full_once)
    found = [result for _, result in engine.measure(wanted)]
    assert math.isnan(found[0].log_ppl) and "memory" in found[0].reason
    assert [result.reason for result in found[1:]] == ["", ""]
    assert len(tiny.snapshot(model)["hooks"]) == 1


@pytest.mark.parametrize("kept_bytes", [2**28, 0])
def test_too_little_memory_for_the_narrowed_weights_is_one_too(monkeypatch, kept_bytes):
    monkeypatch.setattr(bench, "narrowed", partial(narrowed, kept_bytes=kept_bytes))
    model = tiny.model()
    of = layout_of_model(model)
    engine, wanted, calls, full = InProcessEngine(model, of, TEXT, 4096), masks(3, of), [], [True]

    def while_full(*arguments):
        calls.append(1)
        if full and len(calls) > 1:  # after the first site of the first mask
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        cut_site(*arguments)

    before = tiny.snapshot(model)
    monkeypatch.setattr(masking, "cut_site", while_full)
    run = engine.measure(wanted)
    found = [next(run)[1]]
    full.clear()
    found += [result for _, result in run]
    assert "memory" in found[0].reason and [result.reason for result in found[1:]] == ["", ""]
    assert tiny.snapshot(model) == before
