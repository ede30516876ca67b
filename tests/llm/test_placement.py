from weakref import ref

import numpy as np
import pytest
import torch

import tiny_models as tiny
from builders import random_mask, refuses
from ppf.errors import ResourceError
from ppf.llm import placement
from ppf.llm.architectures import layout_of_model, stack_of
from ppf.llm.depth import with_depth
from ppf.llm.engines.bench import Bench
from ppf.llm.load import adopt_model, load_model
from ppf.llm.masking import masked
from ppf.llm.perplexity import measure, reference_of
from ppf.llm.placement import Placement, copied, entry_of, is_spread, spread, take_weights, weight_of
from ppf.llm.scores import SCORES, score_units
from ppf.llm.statistics import layer_statistics
from ppf.llm.text import Text

CPU = torch.device("cpu")
BLOCKS = tiny.blocks(5, 12)
NONE, SOME, ALL = 0.001, 0.75, 10
"""Shares of a model that memory may hold; of what it holds, room for the largest layer stays free."""


def parted(model, share):
    """A copy of which so much is in memory."""
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    return spread(model, CPU, {"cpu": int(share * size)}, torch.float32)


def away(model):
    """Weights that are not in memory now."""
    return [name for name, weight in model.named_parameters() if weight.is_meta]


@pytest.mark.parametrize("share", [NONE, SOME, ALL])
@pytest.mark.parametrize("name", tiny.TINY)
def test_a_spread_model_answers_to_the_bit_as_the_whole_one(name, share):
    model = tiny.model(name)
    before = tiny.snapshot(model)
    twin = parted(model, share)
    gone, there = len(away(twin)), len(list(twin.parameters()))
    assert {NONE: gone == there, SOME: 0 < gone < there, ALL: gone == 0}[share]
    assert is_spread(twin) == (share != ALL) and entry_of(twin) == CPU
    assert tiny.same(tiny.logits(twin, BLOCKS), tiny.logits(model, BLOCKS), name)
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize("share", [NONE, SOME])
@pytest.mark.parametrize("name", tiny.TINY)
def test_masks_and_figures_are_those_of_the_whole_model(name, share):
    model = tiny.model(name)
    of = layout_of_model(model)
    mask, figures = random_mask(of), []
    for one in (model, parted(model, share)):
        reference = reference_of(one, BLOCKS)
        with masked(one, of, mask):
            figures.append(measure(one, BLOCKS, reference, 24))
        assert not any(module._forward_pre_hooks for module in one.modules())
    np.testing.assert_allclose(*figures, rtol=0, atol=2e-6 if tiny.is_mixture(name) else 0)


@pytest.mark.parametrize("method", SCORES)
@pytest.mark.parametrize("name", ["llama-gqa-tied", "olmo2-gqa", "gpt_neox-parallel", "phi3-gqa", "granite-gqa-biases"])
def test_scores_are_those_of_the_whole_model(name, method):
    model = tiny.model(name)
    of = layout_of_model(model)
    twin = parted(model, NONE)
    for ours, theirs in zip(*(score_units(one, of, BLOCKS, method, "", 0).scores for one in (twin, model)), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert away(twin) and not any(weight.requires_grad for weight in twin.parameters())


@pytest.mark.parametrize("name", ["mixtral-gqa", "qwen3_moe-experts-everywhere"])
def test_routers_choose_among_the_experts_that_are_left(name):
    model = tiny.model(name)
    of = with_depth(model, layout_of_model(model))
    figures = []
    for one in (model, parted(model, NONE)):
        with masked(one, of, tiny.EXPERT_MASKS["one"](of)):
            figures.append(measure(one, BLOCKS, None, 24)[0])
    np.testing.assert_allclose(*figures, rtol=0, atol=2e-6)
    assert not np.allclose(figures[0], measure(model, BLOCKS, None, 24)[0], atol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa-tied", "gpt_neox-parallel", "phi3-gqa", "mixtral-gqa"])
def test_statistics_are_those_of_the_whole_model(name):
    model = tiny.model(name)
    of, twin = layout_of_model(model), parted(model, NONE)
    ours, theirs = (vars(layer_statistics(one, of, BLOCKS)) for one in (twin, model))
    for field in ours:
        for found, expected in zip(ours[field], theirs[field], strict=True):
            np.testing.assert_allclose(found, expected, rtol=2e-6 if tiny.is_mixture(name) else 0, err_msg=field)
    assert away(twin)


def test_a_bench_takes_masks_and_shared_layers_of_a_spread_model():
    model = tiny.model()
    of = layout_of_model(model)
    text, mask = Text("t", BLOCKS, BLOCKS, BLOCKS[:0], BLOCKS), random_mask(of)
    whole, parts = (Bench(one, of, text, 24) for one in (model, parted(model, SOME)))
    found, expected = (one.measure(mask, "search", None) for one in (parts, whole))
    assert found.reason == "" and found.losses == pytest.approx(expected.losses, abs=1e-6)


@pytest.mark.parametrize("name", ["gemma3_text-gqa", "llama-gqa-tied"])
def test_files_are_read_in_their_own_precision_and_computed_with_in_another(tmp_path, name):
    loaded = load_model(str(tiny.save(tmp_path, name, dtype=torch.bfloat16)))
    where = Placement(CPU, (("cpu", 1),))
    twin = loaded.on(where, torch.float32)
    assert twin is loaded.on(where, torch.float32) and twin.dtype == torch.float32 and away(twin)
    assert loaded.model.dtype == torch.bfloat16 and not away(loaded.model)
    expected = tiny.logits(copied(loaded.model, Placement(CPU), torch.float32), BLOCKS)
    assert torch.equal(tiny.logits(twin, BLOCKS), expected)


def test_what_does_not_fit_takes_no_memory_of_its_own():
    model = tiny.model("qwen2-gqa")
    twin = parted(model, SOME)
    there = {weight.data_ptr() for weight in twin.parameters() if not weight.is_meta}
    assert there <= {weight.data_ptr() for weight in model.parameters()}
    name = next(name for name, module in twin.named_modules() if type(module) is torch.nn.Linear and module.weight.is_meta)
    assert weight_of(twin.get_submodule(name)).data_ptr() == model.get_submodule(name).weight.data_ptr()


def test_layers_are_never_torn_apart():
    twin = parted(tiny.model(), SOME)
    for layer in stack_of(twin):
        assert len({weight.is_meta for weight in layer.parameters()}) == 1


def test_a_model_that_was_given_is_left_alone():
    model = tiny.model()
    loaded = adopt_model(model, tiny.tokenizer())
    assert away(loaded.on(Placement(CPU, (("cpu", 1),)), torch.float32)) and not away(model)


def test_a_model_keeps_one_spread_copy_whatever_is_free_just_now():
    loaded = adopt_model(tiny.model(), tiny.tokenizer())
    first, second = (Placement(CPU, (("cpu", size),)) for size in (1, 2))
    copy = ref(loaded.on(first, torch.float32))
    assert loaded.on(first, torch.float32) is copy()
    twin = loaded.on(second, torch.float32)
    assert list(loaded.spread.values()) == [twin] and copy() is None


def test_weights_that_are_taken_bring_the_rest_of_the_model_where_they_are():
    there, model = torch.device("meta"), tiny.model("gemma2-gqa")
    exact, model = dict(model.named_buffers()), model.to(there)
    placement._set_buffers(model, exact, model.dtype)
    take_weights(model, tiny.model("gemma2-gqa").to(there))
    assert exact and {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {there}


def test_without_accelerate_it_is_asked_for(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(placement.importlib, "import_module", missing)
    with refuses(ResourceError) as caught:
        spread(tiny.model(), CPU, {"cpu": 1}, torch.float32)
    assert "ppf[spread]" in str(caught.value)
