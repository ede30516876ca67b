"""What vLLM's Transformers backend asks of a folder, as it is documented and as its code does it; vLLM itself is not run.

It builds ``AutoModel.from_config`` on the meta device with an attention of its own, replaces linear layers by the plan for
tensor parallelism and by their shapes, drops layers by the plan for pipeline parallelism, and loads weights by name.
"""

import json
import re
from dataclasses import dataclass, field

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface, AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.masking_utils import AttentionMaskInterface

import tiny_models as tiny
from builders import random_mask
from ppf.llm.architectures import layout_of_model
from ppf.llm.auto import register
from ppf.llm.compensation import reader_means
from ppf.llm.export import export
from ppf.llm.surgery import cut

NAMES = {name: False for name in tiny.TINY} | {f"{name} with biases": True for name in ("llama-mha", "qwen3-gqa")}
every = pytest.mark.parametrize("name", NAMES)
IDS = torch.from_numpy(tiny.blocks(1, 20))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Exports of every family: layers of differing widths, some with biases that make up for what went."""
    place, made = tmp_path_factory.mktemp("exports"), {}
    for number, (name, biased) in enumerate(NAMES.items()):
        dense = tiny.model(name.removesuffix(" with biases"))
        layout = layout_of_model(dense)
        mask = random_mask(layout, number)
        made[name] = place / str(number)
        export(
            cut(dense, layout, mask, reader_means(dense, layout, tiny.blocks()) if biased else None),
            tiny.tokenizer(),
            {},
            made[name],
        )
    register()
    return made


@dataclass
class Watched:
    """An attention in vLLM's place: it answers as transformers' does, and keeps what it was given."""

    calls: list[dict] = field(default_factory=list)

    def __call__(self, module, query, key, value, attention_mask, scaling, attention_instances=None, **more):
        self.calls.append(
            {"layer": module.layer_idx, "causal": module.is_causal, "instance": attention_instances[module.layer_idx]}
            | {
                "query": query.shape,
                "key": key.shape,
                "value": value.shape,
                "scaling": scaling,
                "groups": module.num_key_value_groups,
            }
        )
        window = more.get("sliding_window")
        length = query.shape[2]
        ahead = torch.arange(length)[:, None] - torch.arange(length)
        seen = (ahead >= 0) & (ahead < (window or length))
        answer = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
        )
        return answer.transpose(1, 2).contiguous(), None


def opened(folder, attention="sdpa"):
    """The config as vLLM patches it."""
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = attention
    return config


@every
def test_the_config_names_the_classes_that_the_backend_builds(folders, name):
    written = json.loads((folders[name] / "config.json").read_text())
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} == set(written["auto_map"])
    source = (folders[name] / "modeling_ppf.py").read_text()
    for entry in written["auto_map"].values():
        file, _, kind = entry.partition(".")
        assert file == "modeling_ppf" and f"class {kind}(" in source
    with torch.device("meta"):
        model = AutoModel.from_config(opened(folders[name]))
        whole = AutoModelForCausalLM.from_config(opened(folders[name]))
    assert model.is_backend_compatible() and whole.is_backend_compatible()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.config_class.model_type == written["model_type"] and type(whole).__name__ == written["architectures"][0]
    assert model.get_decoder() is model and model.base_model_prefix == "model"


@every
@torch.inference_mode()
def test_every_layer_asks_the_attention_that_the_config_names(folders, name):
    watched = Watched()
    AttentionInterface.register("watched", watched)
    AttentionMaskInterface.register("watched", lambda *_, **__: None)  # vLLM masks for itself
    config = opened(folders[name], "watched")
    model = AutoModel.from_pretrained(folders[name], config=config)
    instances = {layer: object() for layer in range(config.num_hidden_layers)}
    found = model(
        input_ids=IDS, inputs_embeds=None, use_cache=False, position_ids=torch.arange(IDS.shape[1])[None],
        attention_instances=instances, return_dict=False,
    )  # fmt: skip
    expected = AutoModel.from_pretrained(folders[name])(input_ids=IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-4)
    assert [call["layer"] for call in watched.calls] == list(instances)  # no layer without attention, each asked once
    for call, own in zip(watched.calls, config.per_layer_config, strict=True):
        heads, groups, size = own.num_attention_heads, own.num_key_value_heads, config.head_dim
        assert call["query"] == (1, heads, 20, size) and call["key"] == call["value"] == (1, groups, 20, size)
        assert heads == groups * call["groups"] and groups > 0 and call["causal"]
        assert call["instance"] is instances[call["layer"]]
    assert len({call["scaling"] for call in watched.calls}) == 1


@every
def test_linear_layers_can_be_fused_and_split(folders, name):
    """One head size in all layers; q, k, v of one input and alike in biases; the plan knows every linear layer."""
    config = opened(folders[name])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    for layer, own in zip(model.layers, config.per_layer_config, strict=True):
        q, k, v = (getattr(layer.self_attn, f"{part}_proj") for part in "qkv")
        assert q.in_features == k.in_features == v.in_features == config.hidden_size and k.out_features == v.out_features
        assert (q.out_features, k.out_features) == (
            own.num_attention_heads * config.head_dim,
            own.num_key_value_heads * config.head_dim,
        )
        assert len({part.bias is None for part in (q, k, v)}) == 1
        assert layer.mlp.gate_proj.out_features == layer.mlp.up_proj.out_features == own.intermediate_size > 0
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    styles = {path: [style for pattern, style in model.tp_plan.items() if _fits(pattern, path)] for path in linears}
    for path, found in styles.items():
        reads = path.endswith(("o_proj", "down_proj"))
        assert [style.removesuffix("_gather_output") for style in found] == ["rowwise" if reads else "colwise"], path
    assert len(linears) == 7 * config.num_hidden_layers


def _fits(pattern, path):
    return re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\d+"), path) is not None


@every
def test_layers_can_be_dealt_out_over_a_pipeline(folders, name):
    with torch.device("meta"):
        model = AutoModel.from_config(opened(folders[name]))
    parts = [model.get_submodule(part) for part in model._pp_plan]
    assert [isinstance(part, nn.ModuleList) for part in parts].count(True) == 1
    assert {part for part, module in model.named_children() if next(module.parameters(), None) is not None} == set(model._pp_plan)
    embedding = nn.Embedding(1, 1)
    model.set_input_embeddings(embedding)
    assert model.get_input_embeddings() is embedding


@every
def test_weights_have_the_names_that_the_loader_expects(folders, name):
    config = opened(folders[name])
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    with safe_open(folders[name] / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    head = shapes.pop("lm_head.weight", None)
    assert (head is None) == config.tie_word_embeddings
    assert shapes == {f"model.{key}": tuple(parameter.shape) for key, parameter in model.named_parameters()}
