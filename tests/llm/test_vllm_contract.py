"""What vLLM's Transformers backend asks of a folder, as it is documented and as its code does it; vLLM itself is not run.

It builds ``AutoModel.from_config`` on the meta device with an attention of its own, replaces linear layers by the plan for
tensor parallelism and by their shapes, drops layers by the plan for pipeline parallelism, and loads weights by name.
"""

import importlib.util
import json
import re
from dataclasses import dataclass, field

import pytest
import torch
from safetensors import safe_open
from torch import nn
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
    """An attention in vLLM's place: plain, from what the module hands over alone; it keeps what it was given."""

    calls: list[dict] = field(default_factory=list)

    def __call__(self, module, query, key, value, attention_mask, scaling=None, attention_instances=None, **more):
        seen = {"layer": module.layer_idx, "instance": attention_instances[module.layer_idx], "causal": module.is_causal}
        self.calls.append(seen | {"query": query.shape, "key": key.shape, "value": value.shape, "scaling": scaling})
        length, repeats = query.shape[2], query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(repeats, dim=1).transpose(2, 3) * scaling
        if cap := more.get("softcap"):
            scores = cap * torch.tanh(scores / cap)
        back = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (back < 0) | (back >= (more.get("sliding_window") or length))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return (weights @ value.repeat_interleave(repeats, dim=1)).transpose(1, 2).contiguous(), None


def opened(folder, attention=None):
    """The config, patched as vLLM does before it builds the model."""
    config = AutoConfig.from_pretrained(folder)
    if attention:
        config._attn_implementation = attention
    return config


def empty(folder, kind=AutoModel):
    with torch.device("meta"):
        return kind.from_config(opened(folder))


def linears(folder):
    """The linear modules of the layout by the names that they have in the model without a head: writers, and readers."""
    whole = empty(folder, AutoModelForCausalLM)
    start, layout = f"{whole.base_model_prefix}.", layout_of_model(whole)
    writers = {rows.module.removeprefix(start) for site in layout.sites for rows in site.writers}
    return writers, {site.reader.removeprefix(start) for site in layout.sites}


@every
def test_the_config_names_the_classes_that_the_backend_builds(folders, name):
    written = json.loads((folders[name] / "config.json").read_text())
    spec = importlib.util.spec_from_file_location("modeling_ppf", folders[name] / "modeling_ppf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kinds = {auto: getattr(module, entry.removeprefix("modeling_ppf.")) for auto, entry in written["auto_map"].items()}
    assert set(kinds) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert kinds["AutoConfig"].model_type == written["model_type"]
    assert kinds["AutoModelForCausalLM"].__name__ == written["architectures"][0]
    assert all(kinds[auto].is_backend_compatible() for auto in ("AutoModel", "AutoModelForCausalLM"))
    model = empty(folders[name])
    assert type(model).__name__ == kinds["AutoModel"].__name__ and {one.device.type for one in model.parameters()} == {"meta"}


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
    torch.testing.assert_close(found[0], expected, rtol=1e-3, atol=1e-3)
    assert [call["layer"] for call in watched.calls] == list(instances)  # no layer without attention, each asked once
    for call, own in zip(watched.calls, config.per_layer_config, strict=True):
        heads, size = own.num_attention_heads, config.head_dim
        groups = getattr(own, "num_key_value_heads", heads)
        assert call["query"] == (1, heads, 20, size) and call["key"] == call["value"] == (1, groups, 20, size)
        assert groups > 0 and heads % groups == 0 and call["causal"] and call["instance"] is instances[call["layer"]]
    assert len({call["scaling"] for call in watched.calls}) == 1


@every
def test_linear_layers_can_be_fused_and_split(folders, name):
    """q, k and v of one input, whole heads of one size, alike in biases; the plan, if there is one, knows their place."""
    model, config = empty(folders[name]), opened(folders[name])
    writers, readers = linears(folders[name])
    for attention in {path.rpartition(".")[0] for path in writers if path.endswith("q_proj")}:
        q, k, v = (model.get_submodule(f"{attention}.{part}_proj") for part in "qkv")
        assert q.in_features == k.in_features == v.in_features == config.hidden_size and k.out_features == v.out_features > 0
        assert q.out_features % config.head_dim == k.out_features % config.head_dim == 0
        assert len({part.bias is None for part in (q, k, v)}) == 1
    inside = {path for path, module in model.named_modules() if isinstance(module, nn.Linear) and "layers." in path}
    assert inside >= writers | readers
    for path in writers | readers if model.tp_plan else ():
        styles = [style for pattern, style in model.tp_plan.items() if _fits(pattern, path)]
        assert len(styles) == ("expert" not in path), path  # experts lie apart, which no plan knows: each device has them whole
        assert all(style.startswith("rowwise" if path in readers else "colwise") for style in styles), path


def _fits(pattern, path):
    return re.fullmatch(pattern.replace(".", r"\.").replace("*", r"\d+"), path) is not None


@every
def test_layers_can_be_dealt_out_over_a_pipeline(folders, name):
    model = empty(folders[name])
    decoder = model if model.supports_pp_plan else model.get_decoder()
    filled = [part for part, module in decoder.named_children() if next(module.parameters(), None) is not None]
    parts = list(model._pp_plan) if model.supports_pp_plan else filled
    assert set(filled) <= set(parts)
    (layers,) = [module for module in map(decoder.get_submodule, parts) if isinstance(module, nn.ModuleList)]
    assert len(layers) == model.config.num_hidden_layers
    embedding = nn.Embedding(1, 1)
    model.set_input_embeddings(embedding)
    assert model.get_input_embeddings() is embedding


@every
def test_weights_have_the_names_that_the_loader_expects(folders, name):
    """Those of the model behind its prefix, and the head's, which is there if it is not tied."""
    model, whole = empty(folders[name]), empty(folders[name], AutoModelForCausalLM)
    with safe_open(folders[name] / "model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 (not a dict)
    heads = {f"{path}.weight" for path, module in whole.named_modules() if module is whole.get_output_embeddings()}
    assert heads & shapes.keys() == (set() if whole.config.tie_word_embeddings else heads)
    expected = {f"{model.base_model_prefix}.{key}": tuple(parameter.shape) for key, parameter in model.named_parameters()}
    assert {key: shape for key, shape in shapes.items() if key not in heads} == expected
