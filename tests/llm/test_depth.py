from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_surgery import count, greedy

import tiny_models as tiny
from builders import importance, refuses
from ppf.errors import DamagedError, UnsupportedError
from ppf.llm.architectures import layout_of, layout_of_model, skeleton, stack_of
from ppf.llm.compensation import bias_params, reader_means
from ppf.llm.depth import with_depth
from ppf.llm.elastic import ElasticModel
from ppf.llm.masking import masked, narrowed
from ppf.llm.pruned_model import NoAttention, NoFFN, parts_of
from ppf.llm.ridge import fit_ridge
from ppf.llm.surgery import cut
from ppf.space.allocation import Allocation
from ppf.space.importance import Importance
from ppf.space.mask import Mask, select
from ridge_reference import as_fitted

IDS, BLOCKS = tiny.blocks(2, 14), tiny.blocks(4, 16, seed=4)
NAMES = [name for name in tiny.TINY if name not in tiny.NO_DEPTH]
SHARED = (
    "llama-biases",
    "qwen2-mha-tied-window",
    "gemma2-gqa",
    "gpt_neox-serial-tied",
    "opt-mha",
    "olmo2-gqa",
    "smollm3-gqa-window",
)
CONTRACT = [(name, "attention") for name in NAMES] + [(name, case) for name in SHARED for case in ("layer", "all")]
CONTRACT += [("llama-biases", case) for case in ("ffn", "first", "last")] + [
    ("gemma2-gqa", "first"),
    ("smollm3-gqa-window", "last"),
    ("qwen2_moe-shared", "ffn"),
]
CONTRACT += [(name, case) for name in tiny.MIXTURES[:3] for case in tiny.EXPERT_MASKS]
contract = pytest.mark.parametrize(("name", "case"), CONTRACT)
some = pytest.mark.parametrize("name", ["llama-biases", "gemma2-gqa", "olmo2-gqa", "gpt_neox-parallel", "opt-mha"])


def prepared(name, case):
    model = tiny.model(name)
    layout = with_depth(model, layout_of_model(model))
    return SimpleNamespace(model=model, layout=layout, mask=(tiny.DEPTH_MASKS | tiny.EXPERT_MASKS)[case](layout))


# --- the layout ---


@pytest.mark.parametrize("name", NAMES)
def test_what_goes_with_the_last_unit_is_all_that_a_layer_still_held(name):
    model = tiny.model(name)
    plain = layout_of_model(model)
    deep = with_depth(model, plain)
    assert deep.fingerprint != plain.fingerprint and deep == with_depth(skeleton(model.config), plain)
    for index, layer in enumerate(stack_of(model)):
        named = [*parts_of(layer, "attn"), *parts_of(layer, "ffn")]
        held = sum(parameter.numel() for part in map(layer.get_submodule, named) for parameter in part.parameters())
        assert len(set(named)) == len(named) and held == count(layer)
        sites = [site for site in deep.sites if site.layer == index]
        if all(site.floor == 0 for site in sites):
            assert sum(site.units * site.cost + site.rest + site.last_rest for site in sites) == count(layer)


@pytest.mark.parametrize("name", NAMES)
def test_the_first_attention_and_an_expert_that_all_tokens_see_keep_their_floor(name):
    model = tiny.model(name)
    layout = with_depth(model, layout_of_model(model))
    for site in layout.sites:
        stays = site.layer == 0 if site.role == "attn" else "shared_expert" in site.reader
        assert site.floor == int(stays) and (site.floor == 0 or not site.rest)


def test_norms_that_the_stream_passes_through_are_refused():
    model = tiny.model(tiny.NO_DEPTH[0])
    with refuses(UnsupportedError):
        with_depth(model, layout_of_model(model))


def test_an_artefact_of_one_layout_refuses_the_other(tmp_path):
    model = tiny.model()
    plain = layout_of_model(model)
    importance(plain).save(tmp_path / "importance.safetensors", plain)
    with refuses(DamagedError):
        Importance.load(tmp_path / "importance.safetensors", with_depth(model, plain))


# --- the contract of every family ---


@contract
def test_masked_narrowed_and_cut_are_one_model(name, case):
    one = prepared(name, case)
    before = tiny.snapshot(one.model)
    smaller = cut(one.model, one.layout, one.mask)
    expected = tiny.logits(smaller, IDS)
    for running in (masked, narrowed):
        with running(one.model, one.layout, one.mask):
            torch.testing.assert_close(tiny.logits(one.model, IDS), expected, rtol=0, atol=1e-5)
            assert greedy(one.model, IDS[:, :8], use_cache=True) == greedy(smaller, IDS[:, :8], use_cache=False)
    assert tiny.snapshot(one.model) == before


@contract
def test_parameters_layers_and_lists_are_those_of_what_stays(name, case):
    one = prepared(name, case)
    smaller, kept = cut(one.model, one.layout, one.mask), one.mask.allocation.kept
    assert count(smaller) == one.layout.kept_params(kept)
    stays, config = one.layout.kept_layers(kept), smaller.config
    assert len(stack_of(smaller)) == config.num_hidden_layers == len(config.per_layer_config) == len(stays)
    for field in ("layer_types", "no_rope_layers"):
        if whole := getattr(one.model.config, field, None):
            assert getattr(config, field) == [whole[layer] for layer in stays]
    again = layout_of_model(smaller)
    assert again == layout_of(config) and again.total == count(smaller)
    assert again.units.tolist() == [count for count in kept if count]


@contract
def test_a_cache_answers_as_the_whole_prompt_does(name, case):
    one = prepared(name, case)
    smaller, long, short = cut(one.model, one.layout, one.mask), IDS[:1, :9], IDS[1:, :6]
    padding = np.full((1, 3), 2)
    batch = np.concatenate([long, np.concatenate([padding, short], axis=1)])
    seen = torch.from_numpy(np.concatenate([np.ones_like(long), np.concatenate([0 * padding, np.ones_like(short)], axis=1)]))
    alone = greedy(smaller, long, use_cache=False) + greedy(smaller, short, use_cache=False)
    for options in ({"use_cache": False}, {"use_cache": True}, {"cache_implementation": "static"}):
        assert greedy(smaller, batch, attention_mask=seen, **options) == alone


@contract
def test_what_lost_sublayers_can_be_cut_again(name, case):
    one = prepared(name, case)
    once = cut(one.model, one.layout, one.mask)
    again = with_depth(once, layout_of_model(once))
    second = select(Allocation(np.maximum(again.floors, again.units - 1)), importance(again, 6), again)
    inner = iter(second.bits)
    both = Mask(tuple(_within(bits, next(inner)) if bits.any() else bits for bits in one.mask.bits))
    twice, at_once = cut(once, again, second), cut(one.model, one.layout, both)
    assert tiny.same(tiny.logits(twice, IDS), tiny.logits(at_once, IDS), name)
    assert twice.config.to_dict() == at_once.config.to_dict()


def _within(outer, inner):
    bits = outer.copy()
    bits[outer] = inner
    return bits


def test_layers_hold_no_weight_of_what_is_gone_and_add_nothing():
    one = prepared("llama-biases", "attention")
    layer = stack_of(cut(one.model, one.layout, one.mask))[1]
    assert isinstance(layer.self_attn, NoAttention) and not list(layer.input_layernorm.parameters())
    one = prepared("llama-biases", "ffn")
    layer = stack_of(cut(one.model, one.layout, one.mask))[1]
    assert isinstance(layer.mlp, NoFFN) and not list(layer.post_attention_layernorm.parameters())
    assert not layer.mlp(torch.ones(1, 2, 32)).any()


# --- what makes up for what goes, and the live model ---


@some
@pytest.mark.parametrize("case", ["layer", "attention", "all"])
def test_biases_and_ridge_weights_leave_what_is_gone_alone(name, case):
    one = prepared(name, case)
    fill = reader_means(one.model, one.layout, BLOCKS)
    smaller, kept = cut(one.model, one.layout, one.mask, fill), one.mask.allocation.kept
    assert count(smaller) == one.layout.kept_params(kept) + bias_params(one.model, one.layout, kept)
    with masked(one.model, one.layout, one.mask, fill):
        torch.testing.assert_close(tiny.logits(one.model, IDS), tiny.logits(smaller, IDS), rtol=0, atol=1e-5)
    fitted = fit_ridge(one.model, one.layout, one.mask, BLOCKS)
    smaller = cut(one.model, one.layout, one.mask, fitted=fitted)
    with as_fitted(one.model, one.layout, one.mask, fitted):
        torch.testing.assert_close(tiny.logits(one.model, IDS), tiny.logits(smaller, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", tiny.DEPTH_MASKS)
@pytest.mark.parametrize(
    "name", ["llama-biases", "gemma2-gqa", "qwen3-gqa", "gpt_neox-parallel", "phi3-gqa", "olmo2-gqa", "opt-mha", "mixtral-gqa"]
)
def test_an_elastic_model_runs_without_sublayers_and_gets_them_back(name, case):
    one = prepared(name, case)
    dense, order = tiny.logits(one.model, IDS), importance(one.layout, 5)
    smaller = cut(one.model, one.layout, one.mask)
    live = ElasticModel(tiny.model(name), one.layout, order)
    view = live.set_allocation(one.mask.allocation)
    with torch.inference_mode():
        torch.testing.assert_close(live(input_ids=torch.from_numpy(IDS)).logits, tiny.logits(smaller, IDS), rtol=0, atol=1e-5)
        made = live.generate(input_ids=torch.from_numpy(IDS[:1, :8]), max_new_tokens=6, min_new_tokens=6, do_sample=False)
        assert made[0, 8:].tolist() == greedy(smaller, IDS[:1, :8])[0]
        cache = live(input_ids=torch.from_numpy(IDS), use_cache=True).past_key_values
        assert live.carry(cache, view, view) == "kept"
        less = live.view(Allocation(one.layout.floors))
        assert live.carry(cache, view, less) in ("kept", "narrowed") and live.carry(cache, less, less) == "kept"
        live.set_allocation(Allocation(one.layout.units))
        torch.testing.assert_close(live(input_ids=torch.from_numpy(IDS)).logits, dense, rtol=0, atol=1e-5)
