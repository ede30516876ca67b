import pytest
import torch

import gguf_builders as builders
import tiny_models
from builders import refuses
from ppf.errors import UnsupportedError
from ppf.llm.gguf_archs import ARCHITECTURES, ARCHS
from ppf.llm.gguf_layers import OTHERS, SHIFTED, ends, layers


def test_every_family_lies_in_architectures_that_are_described():
    assert {name for pair in ARCHITECTURES.values() for name in pair} == set(ARCHS)
    assert set(OTHERS) <= set(ARCHITECTURES) and set(OTHERS) >= SHIFTED


@pytest.mark.parametrize("name", builders.HELD)
def test_each_weight_of_a_layer_is_a_part_once_and_shares_its_memory(name):
    smaller = builders.pruned(tiny_models.model(name))
    found = list(layers(smaller))
    assert len(found) == smaller.config.num_hidden_layers
    outer = {id(one) for module in (smaller.get_input_embeddings(), smaller.get_output_embeddings()) for one in module.parameters()}
    inner = sum(one.numel() for one in smaller.parameters() if id(one) not in outer)
    parts = [ends(smaller)[1]]
    for layer in found:
        parts += [*layer.attention.values(), *layer.shared_ffn.values(), *layer.others.values()]
        parts += [part for ffn in layer.ffns for part in ffn.values()]
        assert layer.attention["attn_q"].weight.shape[0] == layer.heads * layer.head_dim
        assert layer.attention["attn_v"].weight.shape[0] == layer.kv_heads * layer.head_dim
        assert layer.attention["attn_output"].weight.shape[1] == layer.heads * layer.head_dim
        assert tuple(ffn["ffn_up"].weight.shape[0] for ffn in layer.ffns) == layer.ffn
        assert tuple(ffn["ffn_down"].weight.shape[1] for ffn in layer.ffns) == layer.ffn
    assert sum(tensor.numel() for part in parts for tensor in part if tensor is not None) == inner


def test_parts_of_separate_matrices_are_views():
    made = tiny_models.model("llama-gqa-tied")
    layer, module = next(iter(layers(made))), made.model.layers[0]
    assert layer.attention["attn_q"].weight.data_ptr() == module.self_attn.q_proj.weight.data_ptr()
    assert (layer.heads, layer.kv_heads, layer.head_dim, layer.ffn, layer.shared) == (4, 2, 8, (40,), 0)
    assert torch.equal(layer.others["ffn_norm"].weight, module.post_attention_layernorm.weight)


def test_norms_that_keep_their_weights_less_one_get_it_back():
    made = tiny_models.model("gemma2-gqa")
    layer = next(iter(layers(made)))
    assert torch.equal(layer.others["post_ffw_norm"].weight, made.model.layers[0].post_feedforward_layernorm.weight + 1)
    assert torch.equal(ends(made)[1].weight, made.model.norm.weight + 1)
    plain = tiny_models.model("olmo2-gqa")
    assert torch.equal(ends(plain)[1].weight, plain.model.norm.weight)


def test_a_layer_without_experts_among_those_with_them_is_refused():
    with refuses(UnsupportedError) as caught:
        list(layers(tiny_models.model("qwen2_moe-shared")))
    assert "layer 1" in str(caught.value)
