"""Which units each model family has. A family is data: one short generator of sites, one entry in ``FAMILIES``."""

import warnings
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ppf.errors import UnsupportedError
from ppf.llm.auto import register
from ppf.space.layout import Layout, Rows, Site


def _llama_like(config: PreTrainedConfig) -> Iterator[Site]:
    """Separate q, k, v, o and gate, up, down projections; grouped-query or multi-head attention; biases or none."""
    for layer in range(config.num_hidden_layers):
        own = config.per_layer_config[layer]
        head = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        groups, per_group = own.num_key_value_heads, own.num_attention_heads // own.num_key_value_heads
        attn, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        yield Site(
            layer,
            "attn",
            groups,
            0,
            (Rows(attn + "q_proj", 0, per_group * head), Rows(attn + "k_proj", 0, head), Rows(attn + "v_proj", 0, head)),
            attn + "o_proj",
            per_group * head,
            (("num_attention_heads", per_group), ("num_key_value_heads", 1)),
            cache=2 * head,
        )
        yield Site(
            layer,
            "ffn",
            own.intermediate_size,
            0,
            (Rows(mlp + "gate_proj", 0, 1), Rows(mlp + "up_proj", 0, 1)),
            mlp + "down_proj",
            1,
            (("intermediate_size", 1),),
        )


FAMILIES: dict[str, Callable[[PreTrainedConfig], Iterator[Site]]] = {
    "llama": _llama_like,
    "mistral": _llama_like,
    "qwen2": _llama_like,
    "qwen3": _llama_like,
}

_PRE_NORM = {"attn": "model.layers.{layer}.input_layernorm", "ffn": "model.layers.{layer}.post_attention_layernorm"}
ENTRANCES: dict[str, dict[str, str]] = {"llama": _PRE_NORM, "mistral": _PRE_NORM, "qwen2": _PRE_NORM, "qwen3": _PRE_NORM}
"""By kind of site, the module whose input is the residual stream before that sub-layer."""


def family_of(config: PreTrainedConfig) -> str:
    """The family's name; a pruned model belongs to the family that it was cut from.

    Raises:
        UnsupportedError: Not a known family.
    """
    name = str(config.model_type).removeprefix("ppf_")
    if name not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise UnsupportedError(f"the model family must be one of {known}; {config.model_type!r} came; use such a model")
    return name


def layout_of(config: PreTrainedConfig) -> Layout:
    """The removable places of a model, known from its config alone; no weight is read.

    Costs are counted on the modules themselves, built without memory, so biases and tied embeddings are exact.

    Raises:
        UnsupportedError: Not a known family, or query heads that are no multiple of the key heads.
    """
    return layout_of_model(skeleton(config))


def layout_of_model(model: PreTrainedModel) -> Layout:
    """``layout_of`` for a model that exists."""
    family = family_of(model.config)

    def row(name: str) -> int:
        module = linear(model, name)
        return module.in_features + (module.bias is not None)

    sites = []
    for site in FAMILIES[family](model.config):
        reader = linear(model, site.reader)
        if site.units * site.columns != reader.in_features:
            shape = f"{site.units} units of {site.columns} columns"
            raise UnsupportedError(f"{site.reader} must read {shape}; it reads {reader.in_features}; use equal KV groups")
        cost = sum(rows.width * row(rows.module) for rows in site.writers) + site.columns * reader.out_features
        sites.append(Site(**{**vars(site), "cost": cost}))
    return Layout(family, model.config.num_hidden_layers, tuple(sites), sum(param.numel() for param in model.parameters()))


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: shapes without memory.

    Raises:
        UnsupportedError: Not a known family, or a config that its family cannot build.
    """
    family_of(config)
    register()
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_config(config)
            model.tie_weights()
    except Exception as error:  # what a wrong value breaks lies anywhere in the family's code
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UnsupportedError(f"config.json must describe a {config.model_type} model; it does not: {reason}; mend it") from error
    return model


def linear(model: PreTrainedModel, name: str) -> nn.Linear:
    """A linear module by its path.

    Raises:
        UnsupportedError: It is none, or one of another kind: quantised, with an adapter.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if type(module) is not nn.Linear:
        kind = "missing" if module is None else f"a {type(module).__name__}"
        raise UnsupportedError(f"{name} must be a plain linear layer; it is {kind}; use a plain, unquantised causal LM")
    return module
