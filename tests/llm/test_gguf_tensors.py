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
from ppf.llm.pruned_model import PRUNED


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
    shape = shape_of(dense)
    found = dict(tensors(dense, shape))
    found.pop("rope_freqs.weight", None)
    if not shape.tied and dense.config.tie_word_embeddings:  # the architecture has no tied head
        assert (found.pop("output.weight") == found["token_embd.weight"]).all()
    found = {key: array for key, array in found.items() if not key.endswith("bias") or array.any()}
    assert sum(array.size for array in found.values()) == sum(one.numel() for one in dense.parameters())
    if not name.startswith(("granite", "gemma")):  # those are not written as they are
        total = sum(float(one.detach().double().square().sum()) for one in dense.parameters())
        assert sum(float(np.square(array.astype(np.float64)).sum()) for array in found.values()) == pytest.approx(total)
    assert tiny_models.snapshot(dense) == before


def test_a_granite_lies_in_the_file_as_a_llama_that_answers_as_it_does():
    """Without llama.cpp: the file's tensors, put back into transformers' Llama, and that model's answers."""
    granite = builders.pruned(builders.model("granite-gqa-biases", tie_word_embeddings=True))
    shape = shape_of(granite)
    found = {name: torch.from_numpy(array) for name, array in tensors(granite, shape)}
    record = {
        key: value for key, value in granite.config.to_dict().items() if key not in ("model_type", "auto_map", "architectures")
    }
    llama = PRUNED["llama"][2]._from_config(PRUNED["llama"][0](**record))
    assert shape.tied and set(llama.state_dict()) == set(granite.state_dict())
    names = {"model.embed_tokens": "token_embd", "lm_head": "token_embd", "model.norm": "output_norm"}
    paths = {
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    state = {}
    for key in llama.state_dict():
        module, _, kind = key.rpartition(".")
        if module not in names:
            _, _, layer, path = module.split(".", 3)
            names[module] = f"blk.{layer}.{paths[path]}"
        array = found[f"{names[module]}.{kind}"]
        if "q_proj" in key or "k_proj" in key:
            array = array.reshape(-1, shape.head_dim // 2, 2, *array.shape[1:]).transpose(1, 2).reshape(array.shape)
        state[key] = array
    llama.load_state_dict(state)
    ids = tiny_models.blocks()
    assert torch.allclose(tiny_models.logits(llama.eval(), ids), tiny_models.logits(granite, ids), atol=2e-5)


def test_a_phi3_is_taken_apart():
    smaller = builders.pruned(tiny_models.model("phi3-gqa"))
    found = dict(tensors(smaller, shape_of(smaller)))
    layer = smaller.model.layers[1]
    gate, up = layer.mlp.gate_up_proj.weight.detach().chunk(2)
    assert (found["blk.1.ffn_gate.weight"] == gate.numpy()).all() and (found["blk.1.ffn_up.weight"] == up.numpy()).all()
    values = layer.self_attn.qkv_proj.weight.detach()[-len(found["blk.1.attn_v.weight"]) :]
    assert (found["blk.1.attn_v.weight"] == values.numpy()).all()


def test_elements_that_are_not_turned_stay_behind_those_that_are():
    rows = np.arange(2 * 8).reshape(16, 1)
    assert interleaved(rows, 2, 4)[:8, 0].tolist() == [0, 2, 1, 3, 4, 5, 6, 7]
    assert interleaved(rows, 2, 4)[8:, 0].tolist() == [8, 10, 9, 11, 12, 13, 14, 15]
    assert (interleaved(rows, 2, 8) == interleaved(rows, 2)).all()


def test_a_gpt_neox_holds_all_queries_then_all_keys_then_all_values():
    made = tiny_models.model("gpt_neox-parallel")
    found = dict(tensors(made, shape_of(made)))
    fused = made.gpt_neox.layers[2].attention.query_key_value
    by_head = fused.weight.detach().numpy().reshape(4, 3, 8, 32)
    assert (found["blk.2.attn_qkv.weight"].reshape(3, 4, 8, 32) == by_head.swapaxes(0, 1)).all()
    assert (found["blk.2.attn_qkv.bias"].reshape(3, 4, 8) == fused.bias.detach().numpy().reshape(4, 3, 8).swapaxes(0, 1)).all()
    without = tiny_models.model("gpt_neox-serial-tied")
    found = dict(tensors(without, shape_of(without)))
    assert not found["blk.0.attn_qkv.bias"].any() and found["blk.0.ffn_up.bias"].any()


def test_experts_of_different_widths_are_stacked_with_zeros_behind_the_narrow():
    smaller = builders.pruned(tiny_models.model("mixtral-gqa"))
    shape = shape_of(smaller)
    found = dict(tensors(smaller, shape))
    for at, layer in enumerate(smaller.model.layers):
        for expert, module in enumerate(layer.mlp.experts):
            gate, width = found[f"blk.{at}.ffn_gate_exps.weight"][expert], module.down_proj.in_features
            assert gate.shape[0] == shape.ffn[at] and not gate[width:].any()
            assert (gate[:width] == module.gate_up_proj.weight.detach().numpy()[:width]).all()
            assert (found[f"blk.{at}.ffn_down_exps.weight"][expert][:, :width] == module.down_proj.weight.detach().numpy()).all()
        assert (found[f"blk.{at}.ffn_gate_inp.weight"] == layer.mlp.gate.weight.detach().numpy()).all()


def test_norms_over_all_heads_are_rid_of_what_padding_would_do_to_their_mean():
    smaller = builders.pruned(tiny_models.model("olmo2-gqa"))
    found = dict(tensors(smaller, shape_of(smaller)))
    for at, layer in enumerate(smaller.model.layers):
        attn, states = layer.self_attn, torch.randn(5, 32, generator=torch.Generator().manual_seed(at))
        rows = states @ torch.from_numpy(found[f"blk.{at}.attn_q.weight"]).T
        normed = rows / (rows.square().mean(-1, keepdim=True) + smaller.config.rms_norm_eps).sqrt()
        normed = normed * torch.from_numpy(found[f"blk.{at}.attn_q_norm.weight"])
        with torch.no_grad():
            own = attn.q_norm(attn.q_proj(states))
        assert torch.allclose(normed[:, : own.shape[1]], own, atol=1e-6) and not normed[:, own.shape[1] :].any()


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
        ("blk.0.ffn_gate_inp.weight", (4, 64), "q8_0", Kind.F32),
        ("blk.0.ffn_gate_exps.weight", (4, 20, 64), "q8_0", Kind.Q8_0),
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
