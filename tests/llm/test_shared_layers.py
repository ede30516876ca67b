from contextlib import closing

import numpy as np
import pytest

import tiny_models as tiny
from ppf.llm.architectures import layout_of_model, stack_of
from ppf.llm.engines.bench import InProcessEngine
from ppf.llm.masking import masked, narrowed
from ppf.llm.perplexity import measure, reference_of
from ppf.llm.shared_layers import SharedLayers, evenly
from ppf.llm.text import Text
from ppf.space.mask import Mask

BLOCKS, OTHERS = tiny.blocks(7, 12), tiny.blocks(3, 12, seed=5)
BATCH = 24  # two blocks: the last batch has one
TEXT = Text("t", BLOCKS, BLOCKS, BLOCKS[:0], OTHERS)


def without(of, *sites):
    """A mask that takes every other unit of some sites."""
    bits = [np.ones(units, dtype=bool) for units in of.units]
    for site in sites:
        bits[site][1::2] = False
    return Mask(tuple(bits))


def probes(of):
    """The dense model, each site alone, and two sites of different layers."""
    return [without(of), *(without(of, site) for site in range(len(of.sites))), without(of, 1, len(of.sites) - 1)]


def opened(model, of, **named):
    """States of the search text."""
    shared = SharedLayers(model, of, BLOCKS.size, **named)
    with shared.kept():
        reference = reference_of(model, BLOCKS, BATCH)
    return shared, reference


def counted(model):
    """How often each layer works from now on."""
    calls = [0] * len(stack_of(model))
    for index, layer in enumerate(stack_of(model)):
        layer.register_forward_pre_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    return calls


@pytest.mark.parametrize("how", [narrowed, masked])
@pytest.mark.parametrize("name", tiny.TINY)
def test_every_family_gives_the_same_figures_to_the_bit(name, how):
    model = tiny.model(name)
    of = layout_of_model(model)
    shared, reference = opened(model, of)
    assert shared.entries == tuple(range(1, of.layers))
    for mask in probes(of):
        with how(model, of, mask):
            plain = measure(model, BLOCKS, reference, BATCH)
            with shared.skipped(mask):
                found = measure(model, BLOCKS, reference, BATCH)
        assert np.array_equal(plain, found)


def test_layers_below_what_is_removed_do_not_work():
    model = tiny.model()
    of = layout_of_model(model)
    shared, reference = opened(model, of)
    calls = counted(model)
    for site, place in enumerate(of.sites):
        before = list(calls)
        with narrowed(model, of, without(of, site)), shared.skipped(without(of, site)):
            measure(model, BLOCKS, reference, BATCH)
        assert np.subtract(calls, before).tolist() == [4 * (layer >= place.layer) for layer in range(of.layers)]


def test_text_that_is_not_kept_goes_through_all_layers():
    model = tiny.model()
    of = layout_of_model(model)
    shared, _ = opened(model, of)
    mask, calls = without(of, len(of.sites) - 1), counted(model)
    with narrowed(model, of, mask):
        plain = measure(model, OTHERS, None, BATCH)
        with shared.skipped(mask):
            assert np.array_equal(measure(model, OTHERS, None, BATCH), plain)
    assert calls == [4] * of.layers  # two batches, twice


def test_the_model_comes_back_as_it_was():
    model = tiny.model()
    of = layout_of_model(model)
    before = tiny.snapshot(model)
    shared, _ = opened(model, of)
    assert tiny.snapshot(model) == before
    with pytest.raises(ZeroDivisionError), shared.skipped(without(of)):
        assert tiny.snapshot(model) != before
        raise ZeroDivisionError
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize("states", [0, 1, 2, 5])
def test_the_states_keep_to_their_budget(states):
    model = tiny.model()
    of = layout_of_model(model)
    one = BLOCKS.size * model.config.hidden_size * 4
    shared, reference = opened(model, of, budget=states * one + 7)
    held = [state for batch in shared._states.values() for state in batch.values()]
    assert sum(state.nbytes for state in held) == min(states, of.layers - 1) * one
    for mask in probes(of):
        with masked(model, of, mask):
            plain = measure(model, BLOCKS, reference, BATCH)
            with shared.skipped(mask):
                assert np.array_equal(measure(model, BLOCKS, reference, BATCH), plain)


@pytest.mark.parametrize("layers", [1, 2, 5, 12, 80])
@pytest.mark.parametrize("room", [0, 1, 3, 7, 500])
def test_states_lie_evenly_between_the_ends(layers, room):
    found = (0, *evenly(layers, room), layers)
    steps = np.diff(found)
    assert len(found) - 2 == min(room, layers - 1) and steps.min() >= 1 and np.ptp(steps) <= 1


@pytest.mark.parametrize("rows", [None, [1, 2, 5]])
def test_an_engine_answers_alike_in_any_order(rows):
    model = tiny.model()
    of = layout_of_model(model)
    wanted = probes(of)
    with closing(InProcessEngine(model, of, TEXT, BATCH)) as engine:
        one = [(result.losses, result.divergences) for _, result in engine.measure(wanted, "search", rows)]
        other = [(result.losses, result.divergences) for _, result in engine.measure(wanted[::-1], "search", rows)]
    assert one == other[::-1]
    for mask, figures in zip(wanted, one, strict=True):
        with closing(InProcessEngine(model, of, TEXT, BATCH)) as engine:
            ((_, alone),) = engine.measure([mask], "search", rows)
        assert (alone.losses, alone.divergences) == figures
