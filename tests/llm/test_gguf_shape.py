from dataclasses import replace

import numpy as np
import pytest
import torch

import gguf_builders as builders
import tiny_models
from builders import importance, refuses
from ppf.errors import UnsupportedError
from ppf.llm import gguf_layers
from ppf.llm.architectures import FAMILIES, layout_of_model
from ppf.llm.compensation import Fill
from ppf.llm.depth import with_depth
from ppf.llm.gguf_archs import ARCHITECTURES
from ppf.llm.gguf_layers import layers
from ppf.llm.gguf_shape import shape_of
from ppf.llm.gguf_tensors import tensors
from ppf.llm.surgery import cut
from ppf.space.allocation import Allocation
from ppf.space.mask import select

FILES = {
    "llama-mha": ("llama", "deci"),
    "llama-biases": ("llama", "deci"),
    "llama-wide-heads-rope": ("llama", "deci"),
    "mistral-gqa": ("llama", "deci"),
    "qwen2-gqa": ("qwen2", "deci"),
    "qwen3-mha-tied": ("qwen3", "openelm"),
    "qwen3-gqa": ("qwen3", "qwen3"),
    "phi3-gqa": ("llama", "deci"),
    "phi3-mha-partial-window": ("llama", "deci"),
    "granite-gqa-biases": ("llama", "deci"),
    "mixtral-gqa": ("llama", "llama"),
    "gemma3_text-gqa": ("gemma3", "gemma3"),
}


def uniform(dense):
    """Half of every layer gone: layers stay alike."""
    layout = layout_of_model(dense)
    return cut(dense, layout, select(Allocation(layout.units // 2), importance(layout), layout))


def fill(dense, value=1.0):
    return Fill(tuple(np.full(site.units * site.columns, value) for site in layout_of_model(dense).sites))


@pytest.mark.parametrize("name", FILES)
def test_layers_that_differ_need_another_architecture_than_layers_alike(name):
    dense = tiny_models.model(name)
    alike, differing = FILES[name]
    assert (shape_of(dense).arch, shape_of(builders.pruned(dense)).arch) == (alike, differing)


@pytest.mark.parametrize("name", builders.REFUSED)
def test_what_no_architecture_computes_is_refused_with_the_reason_and_the_way_out(name):
    with refuses(UnsupportedError) as caught:
        shape_of(tiny_models.model(name))
    assert builders.REFUSED[name] in str(caught.value) and "use the folder" in str(caught.value)
    if name.startswith("opt"):
        assert all(family in str(caught.value) for family in ARCHITECTURES)


def test_the_widths_are_those_of_the_weights():
    dense = tiny_models.model("llama-gqa-tied")
    smaller = builders.pruned(dense)
    shape = shape_of(smaller)
    config = smaller.config.per_layer_config
    assert shape.heads == tuple(config[at].num_attention_heads for at in range(3))
    assert shape.kv_heads == tuple(config[at].num_key_value_heads for at in range(3))
    assert shape.ffn == tuple(config[at].intermediate_size for at in range(3)) and len(set(shape.ffn)) > 1
    assert shape.head_dim == 8 and shape.tied


def test_a_qwen2_whose_attention_is_narrower_than_its_stream_cannot_stay_one():
    """llama.cpp's qwen2 takes the width of the queries from the width of the stream."""
    smaller = uniform(tiny_models.model("qwen2-gqa"))
    assert len(set(shape_of(smaller).heads)) == 1 and shape_of(smaller).arch == "deci"
    assert shape_of(uniform(tiny_models.model("llama-mha"))).arch == "llama"


def test_biases_for_what_was_removed_need_an_architecture_that_has_them():
    dense = tiny_models.model("qwen2-gqa")
    layout = layout_of_model(dense)
    everything = tiny_models.MASKS["nothing"](layout)
    compensated = cut(dense, layout, everything, fill(dense))
    assert shape_of(compensated).arch == "qwen2"  # nothing was removed: the biases are zeros
    assert shape_of(builders.pruned(dense, fill=fill(dense))).arch == "deci"
    for name in ("qwen3-gqa", "qwen3-mha-tied"):
        dense = tiny_models.model(name)
        with refuses(UnsupportedError) as caught:
            shape_of(builders.pruned(dense, fill=fill(dense)))
        assert "biases" in str(caught.value)


def test_an_untied_qwen3_is_padded_to_its_widest_layer_and_says_so():
    smaller = builders.pruned(tiny_models.model("qwen3-gqa"))
    shape = shape_of(smaller)
    own = [layer.mlp.gate_proj.out_features for layer in smaller.model.layers]
    assert shape.ffn == (max(own),) * 3 and min(own) < max(own)
    assert "padded" in shape.notes[0]
    assert shape_of(builders.model("qwen3-gqa", intermediate_size=64)).notes == ()


def test_widths_at_which_llama_cpp_is_slow_are_told():
    """Measured: benchmarks/results/gguf.json."""
    assert shape_of(builders.model("llama-mha", intermediate_size=64)).notes == ()
    (note,) = shape_of(builders.model("llama-mha", intermediate_size=65)).notes
    assert "3 of 3 FFN widths" in note and "attention" not in note and note.endswith("--align 32")
    dense = builders.model("llama-mha", intermediate_size=64)
    layout = layout_of_model(dense)
    kept = [3 if site.role == "attn" and site.layer else site.units for site in layout.sites]  # three heads of 8
    (note,) = shape_of(cut(dense, layout, select(Allocation(np.array(kept)), importance(layout), layout))).notes
    assert "2 of 3 attention widths" in note and "FFN" not in note and note.endswith("--tp 4")


@pytest.mark.parametrize("name", ["mistral-mha-tied-window", "qwen2-mha-tied-window"])
def test_a_sliding_window_bounds_the_context_and_the_user_is_told(name):
    shape = shape_of(tiny_models.model(name))
    assert shape.context == 6 and "window" in shape.notes[-1]
    assert shape_of(tiny_models.model("mistral-gqa")).context == 64


def test_plain_rotary_frequencies_need_no_divisors_and_scaled_ones_get_them():
    assert shape_of(tiny_models.model("llama-mha")).rope_factors is None
    factors = shape_of(tiny_models.model("llama-wide-heads-rope")).rope_factors
    assert factors.shape == (8,) and factors[0] == pytest.approx(1, abs=1e-5) and factors[-1] == pytest.approx(8, rel=1e-5)
    assert (np.diff(factors) >= -1e-5).all()


def test_a_checkpoint_in_half_precision_has_the_same_frequencies():
    half = tiny_models.model("llama-mha", dtype=torch.bfloat16)
    assert shape_of(half).rope_factors is None and shape_of(builders.pruned(half)).rope_factors is None


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}


def test_rotary_embeddings_that_scale_attention_scale_the_queries():
    shape = shape_of(builders.model("llama-mha", rope_parameters=YARN))
    assert shape.query_scale == pytest.approx((0.1 * np.log(4) + 1) ** 2)
    assert shape_of(builders.model("llama-mha")).query_scale == 1


def test_a_qwen3_takes_linear_scaling_only():
    assert shape_of(builders.model("qwen3-mha-tied", rope_parameters=LINEAR)).rope_factors == pytest.approx(np.full(2, 2.0))
    with refuses(UnsupportedError):
        shape_of(builders.model("qwen3-gqa", rope_parameters=YARN))


@pytest.mark.parametrize(("fields", "word"), [({"hidden_act": "gelu"}, "silu"), ({"rope_parameters": DYNAMIC}, "length")])
def test_what_llama_cpp_does_not_compute_is_refused(fields, word):
    with refuses(UnsupportedError) as caught:
        shape_of(builders.model("llama-mha", **fields))
    assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "word"),
    [
        ("gemma2-gqa", {"hidden_activation": "relu"}, "gelu"),
        ("gemma2-gqa", {"tie_word_embeddings": False}, "output head"),
        ("gemma3_text-gqa", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("qwen2_moe-experts-everywhere", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("qwen3_moe-experts-everywhere", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("qwen3_moe-experts-everywhere", {"rope_parameters": YARN}, "linear"),
        ("smollm3-fourth-layer-plain", {"mlp_bias": True}, "biases"),
        ("smollm3-fourth-layer-plain", {"no_rope_layers": [1, 1, 1, 1, 0]}, "each 4th"),
        ("olmo2-gqa", {"head_dim": 16}, "do not fit"),
    ],
)
def test_what_an_architecture_takes_for_granted_must_be_so(name, fields, word):
    with refuses(UnsupportedError) as caught:
        shape_of(builders.model(name, **fields))
    assert word in str(caught.value) and "use the folder" in str(caught.value)


def test_heads_of_odd_width_are_refused(monkeypatch):
    """Their elements cannot be turned in pairs."""
    patched(monkeypatch, "attn", writers=lambda rows: replace(rows, width=7))
    with refuses(UnsupportedError) as caught:
        shape_of(tiny_models.model("llama-mha"))
    assert "even" in str(caught.value)


def patched(monkeypatch, role, units=None, writers=None, layer=None):
    """Llama's sites of one role, with other fields."""

    def sites(config):
        for site in FAMILIES["llama"](config):
            if site.role == role and layer in (None, site.layer):
                site = replace(
                    site,
                    units=site.units if units is None else units,
                    writers=tuple(map(writers, site.writers)) if writers else site.writers,
                )
            yield site

    monkeypatch.setattr(gguf_layers, "FAMILIES", {"llama": sites})


def test_a_first_layer_without_heads_is_refused(monkeypatch):
    """llama.cpp would load some of these files and answer wrongly, or end the process."""
    patched(monkeypatch, "attn", units=0, layer=0)
    with refuses(UnsupportedError) as caught:
        shape_of(tiny_models.model("llama-mha"))
    assert "layer 0" in str(caught.value)


def deep(name, kind):
    dense = tiny_models.model(name)
    layout = with_depth(dense, layout_of_model(dense))
    return cut(dense, layout, (tiny_models.DEPTH_MASKS | tiny_models.EXPERT_MASKS)[kind](layout))


def test_only_deci_has_layers_without_attention_and_none_has_layers_without_an_ffn():
    shape = shape_of(deep("llama-mha", "attention"))
    assert shape.arch == "deci" and shape.heads[1] == shape.kv_heads[1] == 0
    names = [name for name, _ in tensors(deep("llama-mha", "attention"), shape)]
    assert not [name for name in names if name.startswith("blk.1.attn")] and "blk.1.ffn_norm.weight" in names
    shape = shape_of(deep("qwen3-mha-tied", "attention"))
    assert shape.arch == "openelm" and shape.kv_heads[1] == 1
    smaller = deep("llama-mha", "ffn")
    shape = shape_of(smaller)
    zeros = dict(tensors(smaller, shape))["blk.1.ffn_down.weight"]
    assert zeros.shape == (smaller.config.hidden_size, 32) and not zeros.any() and "1 that are gone" in shape.notes[0]


def test_a_layer_less_moves_the_pattern_of_plain_layers_and_is_refused():
    with refuses(UnsupportedError) as caught:
        shape_of(deep("smollm3-fourth-layer-plain", "layer"))
    assert "rotary" in str(caught.value)


@pytest.mark.parametrize("name", ["gemma2-gqa", "gpt_neox-parallel", "mixtral-gqa", "olmo2-gqa", "smollm3-fourth-layer-plain"])
def test_layers_that_differ_are_padded_to_the_widest_where_no_architecture_holds_them(name):
    smaller = builders.pruned(tiny_models.model(name))
    shape, found = shape_of(smaller), list(layers(smaller))
    assert len({layer.heads for layer in found}) > 1 or len({layer.ffn for layer in found}) > 1
    assert set(shape.heads) == {shape.heads[0]} and shape.heads[0] >= max(layer.heads for layer in found)
    assert set(shape.ffn) == {max(max(layer.ffn) for layer in found)}
    size = sum(array.size for _, array in tensors(smaller, shape))
    told = float(shape.notes[0].rpartition(", ")[2].partition("%")[0]) / 100
    own = sum(one.numel() for one in smaller.parameters())
    assert "padded with zeros" in shape.notes[0] and told == pytest.approx(1 - own / size, abs=0.04)


def test_a_file_that_padding_would_make_as_large_as_before_is_refused():
    dense = tiny_models.model("smollm3-fourth-layer-plain")
    layout = layout_of_model(dense)
    kept = layout.units.copy()
    kept[2:] = kept[2:] // 2
    smaller = cut(dense, layout, select(Allocation(kept), importance(layout), layout))
    with refuses(UnsupportedError) as caught:
        shape_of(smaller)
    assert "as large as before" in str(caught.value) and "equal ratios" in str(caught.value)


@pytest.mark.parametrize("name", ["olmo2-gqa", "gpt_neox-parallel", "qwen2_moe-experts-everywhere"])
def test_queries_as_wide_as_the_stream_stay_so_where_llama_cpp_wants_them_so(name):
    smaller = uniform(tiny_models.model(name))
    shape = shape_of(smaller)
    assert {of * shape.head_dim for of in shape.heads} == {smaller.config.hidden_size}
    assert "as wide as its stream" in shape.notes[0] and shape.ffn[0] == list(layers(smaller))[0].ffn[0]


def test_multipliers_of_a_granite_become_factors_of_embeddings_queries_outputs_and_the_last_norm():
    made = tiny_models.model("granite-gqa-biases")
    shape = shape_of(made)
    assert (shape.embedding_scale, shape.reader_scale) == (2.0, 0.5) and shape.output_scale == pytest.approx(1 / 3.0)
    assert shape.query_scale == pytest.approx(0.2 * 8**0.5)
    tied = shape_of(builders.model("granite-gqa-biases", tie_word_embeddings=True))
    assert tied.embedding_scale == 2.0 and tied.output_scale == pytest.approx(1 / 6.0)


def test_a_gemma_scales_attention_by_another_number_than_its_heads_width():
    assert shape_of(tiny_models.model("gemma2-gqa")).query_scale == pytest.approx((16 / 24) ** 0.5)


def test_windows_by_layer_are_told_to_architectures_that_have_them():
    shape = shape_of(tiny_models.model("gemma3_text-gqa"))
    assert shape.context == 64 and shape.keys["attention.sliding_window"] == 6
    assert shape.keys["attention.sliding_window_pattern"] == [True, False, True]
    assert (shape.rope_base, shape.keys["rope.freq_base_swa"]) == (1e6, 1e4)


def test_a_file_that_padding_makes_as_large_as_before_is_written_where_layers_went():
    smaller = deep("gemma2-gqa", "layer")
    shape = shape_of(smaller)
    assert len(shape.ffn) == 2 and sum(array.size for _, array in tensors(smaller, shape)) < smaller.config.ppf_dense_params
    dense = tiny_models.model("gemma2-gqa")
    layout = with_depth(dense, layout_of_model(dense))
    kept = layout.units.copy()
    kept[2:4], kept[-1] = 0, kept[-1] // 2
    once = cut(dense, layout, select(Allocation(kept), importance(layout), layout))
    assert "padded with zeros" in shape_of(once).notes[0]
    again = layout_of_model(once)
    twice = cut(once, again, select(Allocation(again.units - [0, 0, 0, 1]), importance(again), again))
    assert twice.config.ppf_dense_params == layout.total and "padded with zeros" in shape_of(twice).notes[0]


@pytest.mark.parametrize("name", ["mixtral-gqa", "qwen2_moe-experts-everywhere", "qwen3_moe-experts-everywhere"])
def test_experts_that_are_left_must_be_as_many_in_all_layers(name):
    for case, used in (("one", 2), ("one left", 1)):
        shape = shape_of(deep(name, case))
        assert (shape.keys["expert_count"], shape.keys["expert_used_count"]) == ({"one": 3, "one left": 1}[case], used)
    for case in ("differing", "none left"):
        with refuses(UnsupportedError) as caught:
            shape_of(deep(name, case))
        assert "experts in all layers" in str(caught.value) and "use the folder" in str(caught.value)


def test_experts_are_counted():
    keys = shape_of(tiny_models.model("qwen2_moe-experts-everywhere")).keys
    assert (keys["expert_count"], keys["expert_used_count"]) == (4, 2)
    assert (keys["expert_feed_forward_length"], keys["expert_shared_feed_forward_length"]) == (20, 24)
