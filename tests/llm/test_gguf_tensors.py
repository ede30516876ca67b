import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import gguf_builders as builders
import tiny_models
from builders import refuses
from ppf.errors import DamagedError, InputError
from ppf.llm.gguf_shape import shape_of
from ppf.llm.gguf_tensors import interleaved, tensors, type_of


def turned(rows, angles, pairs):
    """Rotates rows i and i + d/2, or 2i and 2i + 1, by angle i."""
    d = len(rows)
    first, second = (np.arange(0, d, 2), np.arange(1, d, 2)) if pairs else (np.arange(d // 2), np.arange(d // 2, d))
    out = rows.copy()
    out[first] = rows[first] * np.cos(angles) - rows[second] * np.sin(angles)
    out[second] = rows[second] * np.cos(angles) + rows[first] * np.sin(angles)
    return out


@pytest.mark.parametrize("heads", [1, 2, 3])
def test_reordered_rows_turned_in_pairs_give_the_scores_of_rows_turned_in_halves(heads):
    rng, d = np.random.default_rng(heads), 8
    queries, keys = rng.normal(size=(2, heads * d))
    near, far = rng.normal(size=(2, d // 2))
    for head in range(heads):
        own = slice(head * d, head * d + d)
        halves = turned(queries[own], near, False) @ turned(keys[own], far, False)
        pairs = turned(interleaved(queries, heads)[own], near, True) @ turned(interleaved(keys, heads)[own], far, True)
        assert halves == pytest.approx(pairs)


def test_each_layer_is_reordered_with_its_own_head_count():
    smaller = builders.pruned(tiny_models.model("llama-mha"))
    shape = shape_of(smaller)
    assert len(set(shape.heads)) > 1
    found = dict(tensors(smaller, shape))
    for at, layer in enumerate(smaller.model.layers):
        own = layer.self_attn.q_proj.weight.detach().numpy()
        for head in range(shape.heads[at]):
            rows, theirs = own[head * 8 : head * 8 + 8], found[f"blk.{at}.attn_q.weight"][head * 8 : head * 8 + 8]
            assert (theirs[0::2] == rows[:4]).all() and (theirs[1::2] == rows[4:]).all()
        assert (found[f"blk.{at}.attn_v.weight"] == layer.self_attn.v_proj.weight.detach().numpy()).all()


@pytest.mark.parametrize("name", builders.HELD)
def test_every_weight_is_in_the_file_once(name):
    dense = tiny_models.model(name)
    before = tiny_models.snapshot(dense)
    found = dict(tensors(dense, shape_of(dense)))
    extra = {"rope_freqs.weight"} & set(found)
    assert sum(array.size for key, array in found.items() if key not in extra) == sum(one.numel() for one in dense.parameters())
    total = sum(float(one.detach().double().square().sum()) for one in dense.parameters())
    squares = sum(float(np.square(array.astype(np.float64)).sum()) for key, array in found.items() if key not in extra)
    assert squares == pytest.approx(total)
    assert tiny_models.snapshot(dense) == before


def test_tied_qwen3_layers_hold_queries_keys_and_values_in_one_matrix():
    smaller = builders.pruned(tiny_models.model("qwen3-mha-tied"))
    found = dict(tensors(smaller, shape_of(smaller)))
    attn = smaller.model.layers[0].self_attn
    rows = torch.cat([attn.q_proj.weight, attn.k_proj.weight, attn.v_proj.weight]).detach().numpy()
    assert (found["blk.0.attn_qkv.weight"] == rows).all() and "blk.0.attn_q.weight" not in found and "output.weight" not in found


def test_padding_adds_zeros_and_nothing_else():
    smaller = builders.pruned(tiny_models.model("qwen3-gqa"))
    shape = shape_of(smaller)
    found = dict(tensors(smaller, shape))
    for at, layer in enumerate(smaller.model.layers):
        for name, module, axis in (("ffn_gate", layer.mlp.gate_proj, 0), ("ffn_down", layer.mlp.down_proj, 1)):
            array, own = found[f"blk.{at}.{name}.weight"], module.weight.detach().numpy()
            assert array.shape[axis] == shape.ffn[at]
            kept, rest = np.split(array, [own.shape[axis]], axis=axis)
            assert (kept == own).all() and not rest.any()
        assert found[f"blk.{at}.attn_q.weight"].shape[0] == shape.heads[at] * shape.head_dim


def test_biases_of_zeros_behind_readers_are_left_out_and_others_are_not():
    dense = tiny_models.model("llama-biases")
    with torch.no_grad():
        dense.model.layers[1].mlp.down_proj.bias.zero_()
    found = dict(tensors(dense, shape_of(dense)))
    assert "blk.0.ffn_down.bias" in found and "blk.1.ffn_down.bias" not in found and "blk.1.attn_q.bias" in found


def test_weights_that_are_not_finite_are_refused():
    dense = tiny_models.model("llama-mha")
    with torch.no_grad():
        dense.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with refuses(DamagedError) as caught:
        list(tensors(dense, shape_of(dense)))
    assert "blk.2.ffn_up.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "quant", "kind"),
    [
        ("blk.0.ffn_up.weight", (40, 64), "q8_0", Kind.Q8_0),
        ("blk.0.ffn_down.weight", (64, 40), "q8_0", Kind.F16),
        ("blk.0.ffn_down.weight", (64, 32), "q4_0", Kind.Q4_0),
        ("blk.0.ffn_down.weight", (64, 33), "q4_0", Kind.F16),
        ("token_embd.weight", (96, 64), "q4_0", Kind.Q8_0),
        ("output.weight", (96, 40), "q4_0", Kind.F16),
        ("blk.0.ffn_down.weight", (64, 33), "f32", Kind.F32),
        ("blk.0.ffn_down.weight", (64, 33), "bf16", Kind.BF16),
        ("blk.0.attn_norm.weight", (64,), "q4_0", Kind.F32),
        ("blk.0.attn_q.bias", (64,), "f16", Kind.F32),
    ],
)
def test_the_type_of_a_tensor_follows_its_width(name, shape, quant, kind):
    assert type_of(name, np.ones(shape, np.float32), quant) == kind


@pytest.mark.parametrize(("width", "quant"), [(64, "f16"), (33, "q8_0")])
def test_weights_beyond_float16_are_refused_where_they_would_be_stored_so(width, quant):
    array = np.full((2, width), 7e4, np.float32)
    with refuses(InputError):
        type_of("blk.0.ffn_up.weight", array, quant)
    assert type_of("blk.0.ffn_up.weight", array, "bf16") == Kind.BF16
