import numpy as np
import pytest
import torch

import gguf_builders as builders
import tiny_models
from builders import importance, refuses
from ppf.errors import UnsupportedError
from ppf.llm.architectures import layout_of_model
from ppf.llm.compensation import Fill
from ppf.llm.gguf_archs import ARCHITECTURES
from ppf.llm.gguf_shape import shape_of
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


@pytest.mark.parametrize("name", sorted(set(tiny_models.TINY) - {*builders.HELD, "qwen3-biases"}))
def test_other_families_are_refused_with_those_that_are_held(name):
    with refuses(UnsupportedError) as caught:
        shape_of(tiny_models.model(name))
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
    assert note.startswith("3 of 6") and "--align 32" in note


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


@pytest.mark.parametrize(
    ("fields", "word"), [({"hidden_act": "gelu"}, "silu"), ({"rope_parameters": DYNAMIC}, "length"), ({"head_dim": 7}, "even")]
)
def test_what_llama_cpp_does_not_compute_is_refused(fields, word):
    if "head_dim" in fields:
        made = tiny_models.model("llama-mha")
        for layer in made.model.layers:
            layer.self_attn.head_dim = 7
    else:
        made = builders.model("llama-mha", **fields)
    with refuses(UnsupportedError) as caught:
        shape_of(made)
    assert word in str(caught.value)


@pytest.mark.parametrize("empty", ["gate_proj", "q_proj", "k_proj"])
def test_a_layer_without_heads_or_channels_is_refused(empty):
    """llama.cpp would load some of these files and answer wrongly, or end the process."""
    made = tiny_models.model("llama-mha")
    layer = made.model.layers[1]
    module = getattr(layer.mlp if empty == "gate_proj" else layer.self_attn, empty)
    module.out_features = 0
    with refuses(UnsupportedError) as caught:
        shape_of(made)
    assert "layer 1" in str(caught.value)
