import threading

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import tiny_models as tiny
from builders import importance, random_mask, refuses
from ppf.errors import DamagedError, InputError, UnsupportedError
from ppf.llm.architectures import layout_of_model
from ppf.llm.depth import with_depth
from ppf.llm.elastic import ElasticModel
from ppf.llm.masking import narrowed
from ppf.llm.surgery import cut
from ppf.space.allocation import Allocation
from ppf.space.layout import Layout, Site
from ppf.space.mask import select

IDS = tiny.blocks(2, 14)
FAMILIES = list(tiny.TINY)
OF_EACH_CODE = ["llama-gqa-tied", "phi3-gqa", "olmo2-gqa", "opt-mha", "qwen2_moe-shared", "gpt_neox-parallel"]
"""One with plain layers, then fused ones, norms over all heads, counts of heads, experts, and heads one behind another."""


def elastic(name="llama-gqa-tied", decide=None, seed=0):
    model = tiny.model(name)
    layout = layout_of_model(model)
    return ElasticModel(model, layout, importance(layout, seed), decide)


def answers(live, ids=IDS, view=None):
    with torch.inference_mode(), live.at(view) as model:
        return model(input_ids=torch.from_numpy(ids), use_cache=False).logits


def shrunk(layout, share):
    """About a share of every site."""
    return Allocation(np.maximum(layout.floors, (layout.units * share).astype(int)))


@pytest.mark.parametrize("name", FAMILIES)
def test_putting_units_in_order_changes_no_answer(name):
    expected = tiny.logits(tiny.model(name), IDS)
    torch.testing.assert_close(answers(elastic(name)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name in FAMILIES for case in ("uniform", "floors", "only ffn", "only attn")]
)
def test_at_any_allocation_it_answers_as_the_cut_model(name, case):
    live, dense = elastic(name, seed=5), tiny.model(name)
    allocation = tiny.MASKS[case](live.layout).allocation
    expected = tiny.logits(cut(dense, live.layout, select(allocation, importance(live.layout, 5), live.layout)), IDS)
    live.set_allocation(allocation)
    with torch.inference_mode():
        torch.testing.assert_close(live(input_ids=torch.from_numpy(IDS)).logits, expected, rtol=0, atol=1e-5)
    live.set_allocation(Allocation(live.layout.units))
    torch.testing.assert_close(answers(live), tiny.logits(dense, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", tiny.EXPERT_MASKS)
@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_without_some_experts_it_sends_tokens_where_the_cut_model_does(name, case):
    dense, model = tiny.model(name), tiny.model(name)
    layout = with_depth(dense, layout_of_model(dense))
    mask = tiny.EXPERT_MASKS[case](layout)
    live = ElasticModel(model, layout, importance(layout, 5))
    expected = tiny.logits(cut(dense, layout, mask), IDS)
    torch.testing.assert_close(answers(live, view=live.view(mask.allocation)), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(answers(live), tiny.logits(dense, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OF_EACH_CODE)
def test_views_take_no_memory_and_the_model_stays_one_dense_copy(name):
    live, dense = elastic(name), tiny.model(name)
    size = sum(parameter.numel() for parameter in dense.parameters())
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in live._model.parameters()}
    assert sum(storages.values()) == 4 * size
    for share in np.linspace(0.1, 1, 30):
        view = live.set_allocation(shrunk(live.layout, share))
        for weight, bias in (part for parts in view.tensors for part in parts):
            assert weight.untyped_storage().data_ptr() in storages and (
                bias is None or bias.untyped_storage().data_ptr() in storages
            )


@pytest.mark.parametrize("name", OF_EACH_CODE)
def test_a_model_that_shares_the_tensors_is_not_changed(name):
    dense = tiny.model(name)
    before = tiny.snapshot(dense)
    twin = tiny.model(name)
    for path, parameter in dense.named_parameters():
        owner, _, leaf = path.rpartition(".")
        setattr(twin.get_submodule(owner), leaf, parameter)
    live = ElasticModel(twin, layout_of_model(dense), importance(layout_of_model(dense)))
    live.set_allocation(Allocation(live.layout.floors))
    answers(live)
    assert tiny.snapshot(dense) == before


def test_a_ratio_goes_through_the_decider():
    live = elastic()
    live = elastic(decide=lambda ratio: shrunk(live.layout, 1 - ratio))
    assert live.set_ratio(0.5).allocation.kept.tolist() == shrunk(live.layout, 0.5).kept.tolist()
    assert live.current.allocation.kept.tolist() == shrunk(live.layout, 0.5).kept.tolist()
    with refuses(InputError):
        elastic().set_ratio(0.5)


@pytest.mark.parametrize("kept", [lambda of: of.floors - 1, lambda of: of.units + 1, lambda of: of.units[:-1]])
def test_allocations_of_no_such_model_are_refused(kept):
    live = elastic()
    with refuses(InputError):
        live.set_allocation(Allocation(kept(live.layout)))
    assert live.current.allocation.kept.tolist() == live.layout.units.tolist()


def test_another_models_importance_is_refused():
    model = tiny.model()
    with refuses(DamagedError):
        ElasticModel(model, layout_of_model(model), importance(layout_of_model(tiny.model("llama-mha"))))


# --- threads ---


@pytest.mark.parametrize("name", OF_EACH_CODE)
def test_requests_of_different_ratios_do_not_disturb_each_other(name):
    live = elastic(name)
    views = [live.view(shrunk(live.layout, share)) for share in (0.25, 0.5, 0.75, 1)]
    expected = [answers(live, view=view) for view in views]
    wrong, stop = [], threading.Event()

    def ask(index):
        for _ in range(20):
            if not torch.equal(answers(live, view=views[index]), expected[index]):
                wrong.append(index)

    def turn():
        while not stop.is_set():
            for view in views:
                live.set_allocation(view.allocation)

    turner = threading.Thread(target=turn)
    turner.start()
    askers = [threading.Thread(target=ask, args=(index,)) for index in range(4)]
    for thread in askers:
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    turner.join()
    assert not wrong


def test_a_request_keeps_the_size_that_it_began_with():
    live = elastic()
    small = live.view(Allocation(live.layout.floors))
    with torch.inference_mode(), live.at() as model:
        live.set_allocation(small.allocation)
        begun = model(input_ids=torch.from_numpy(IDS), use_cache=False).logits
    torch.testing.assert_close(begun, tiny.logits(tiny.model(), IDS), rtol=0, atol=1e-5)
    assert torch.equal(answers(live), answers(live, view=small))


def test_a_thread_in_which_a_request_failed_runs_as_before():
    live = elastic()
    expected = answers(live)
    with pytest.raises(RuntimeError, match="stop"), live.at(live.view(Allocation(live.layout.floors))):
        raise RuntimeError("stop")
    assert torch.equal(answers(live), expected)


# --- the KV cache ---


def primed(live, view):
    """A cache of the first tokens, made at a view."""
    cache = DynamicCache(config=live.config)
    with torch.inference_mode(), live.at(view) as model:
        model(input_ids=torch.from_numpy(IDS[:, :10]), past_key_values=cache, use_cache=True)
    return cache


def continued(live, view, cache):
    with torch.inference_mode(), live.at(view) as model:
        return model(input_ids=torch.from_numpy(IDS[:, 10:]), past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize(
    "name", ["llama-mha", "mistral-mha-tied-window", "qwen2-mha-tied-window", "qwen3-gqa", "phi3-mha-partial-window", "opt-mha"]
)
def test_a_cache_is_narrowed_to_the_groups_that_stay(name):
    live = elastic(name)
    whole, half = live.view(Allocation(live.layout.units)), live.view(shrunk(live.layout, 0.5))
    cache = primed(live, whole)
    keys = [layer.keys.clone() for layer in cache.layers]
    assert live.carry(cache, whole, half) == "narrowed"
    groups = [kept for site, kept in zip(live.layout.sites, half.allocation.kept, strict=True) if site.kind == "attn"]
    for layer, before, group in zip(cache.layers, keys, groups, strict=True):
        assert torch.equal(layer.keys, before[:, :group]) and layer.values.shape == layer.keys.shape
    assert continued(live, half, cache).isfinite().all()


def test_a_cache_of_which_only_channels_change_is_kept():
    live = elastic()
    kept = [site.units // 2 if site.kind == "ffn" else site.units for site in live.layout.sites]
    whole, less = live.view(Allocation(live.layout.units)), live.view(Allocation(np.array(kept)))
    cache = primed(live, whole)
    keys = [layer.keys for layer in cache.layers]
    assert live.carry(cache, whole, less) == "kept"
    assert all(layer.keys is before for layer, before in zip(cache.layers, keys, strict=True))


def test_a_cache_that_lacks_groups_is_left_to_be_rebuilt():
    live = elastic("llama-mha")
    whole, half = live.view(Allocation(live.layout.units)), live.view(shrunk(live.layout, 0.5))
    cache = primed(live, half)
    shapes = [layer.keys.shape for layer in cache.layers]
    assert live.carry(cache, half, whole) == "rebuild"
    assert [layer.keys.shape for layer in cache.layers] == shapes
    assert live.carry(DynamicCache(config=live.config), whole, half) == "rebuild"


@pytest.mark.parametrize("name", ["llama-mha", *OF_EACH_CODE[1:]])
def test_a_cache_works_at_the_size_that_made_it(name):
    live = elastic(name)
    half = live.view(shrunk(live.layout, 0.5))
    torch.testing.assert_close(continued(live, half, primed(live, half)), answers(live, view=half)[:, 10:], rtol=0, atol=1e-5)


# --- what cannot be elastic ---


def test_an_elastic_model_has_no_layout_for_the_importance_that_ordered_it():
    with refuses(UnsupportedError), elastic().at() as model:
        layout_of_model(model)


def test_an_elastic_model_is_neither_cut_nor_narrowed():
    live = elastic()
    mask = random_mask(live.layout)
    with refuses(UnsupportedError), live.at() as model:
        cut(model, live.layout, mask)
    with refuses(UnsupportedError), live.at() as model, narrowed(model, live.layout, mask):
        pass


def without(layout, part):
    """The layout of a family of which one writer is not known."""
    first = layout.sites[0]
    site = Site(**{**vars(first), "writers": tuple(rows for rows in first.writers if part not in rows.module)})
    return Layout(layout.model_type, layout.layers, (site, *layout.sites[1:]), layout.total)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj"])
def test_what_does_not_answer_as_the_masked_model_is_refused(part):
    model = tiny.model("llama-mha")
    layout = layout_of_model(model)
    with refuses(UnsupportedError):
        ElasticModel(model, without(layout, part), importance(layout))


def test_what_looks_at_all_units_at_once_is_refused():
    model = tiny.model("llama-mha")
    model.model.layers[0].mlp.act_fn = torch.nn.Softmax(-1)  # depends on units that are masked
    layout = layout_of_model(model)
    with refuses(UnsupportedError) as caught:
        ElasticModel(model, layout, importance(layout))
    assert "differ" in str(caught.value)


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_routers_that_do_not_follow_are_refused(name, monkeypatch):
    monkeypatch.setattr("ppf.llm.prefix.routers", lambda _: {})
    model = tiny.model(name)
    layout = with_depth(model, layout_of_model(model))
    with refuses(UnsupportedError) as caught:
        ElasticModel(model, layout, importance(layout))
    assert "differ" in str(caught.value)
