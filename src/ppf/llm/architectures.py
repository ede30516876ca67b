"""Which units each model family has. A family is data: one short generator of sites, one entry in ``FAMILIES``."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ppf.errors import UnsupportedError
from ppf.llm.auto import register
from ppf.llm.experts import separate_experts
from ppf.space.layout import Layout, Rows, Site


def _llama_like(config: PreTrainedConfig) -> Iterator[Site]:
    """Separate q, k, v, o and gate, up, down projections; grouped-query or multi-head attention; biases or none."""
    for layer, own in enumerate(config.per_layer_config):
        yield _attention(layer, own)
        yield _gated(layer, own)


def _olmo2(config: PreTrainedConfig) -> Iterator[Site]:
    """As above, but queries and keys are normed over all heads at once."""
    for layer, own in enumerate(config.per_layer_config):
        site = _attention(layer, own)
        path, (queries, keys, _) = f"model.layers.{layer}.self_attn.", site.writers
        yield replace(site, norms=(replace(queries, module=path + "q_norm"), replace(keys, module=path + "k_norm")))
        yield _gated(layer, own)


def _phi3(config: PreTrainedConfig) -> Iterator[Site]:
    """One matrix for q, k and v, one for gate and up; each is a block of its rows."""
    for layer, own in enumerate(config.per_layer_config):
        head, groups, per_group = _heads(own)
        attn, mlp = f"model.layers.{layer}.self_attn.", f"model.layers.{layer}.mlp."
        queries, fused = own.num_attention_heads * head, attn + "qkv_proj"
        starts = (0, per_group * head), (queries, head), (queries + groups * head, head)
        rows = tuple(Rows(fused, start, width) for start, width in starts)
        counts = (("num_attention_heads", per_group), ("num_key_value_heads", 1))
        yield Site(layer, "attn", groups, 0, rows, attn + "o_proj", per_group * head, counts, cache=2 * head)
        width, fused = own.intermediate_size, mlp + "gate_up_proj"
        rows = (Rows(fused, 0, 1), Rows(fused, width, 1))
        yield Site(layer, "ffn", width, 0, rows, mlp + "down_proj", 1, (("intermediate_size", 1),))


def _gpt_neox(config: PreTrainedConfig) -> Iterator[Site]:
    """One matrix for q, k and v, head after head; no gate."""
    for layer, own in enumerate(config.per_layer_config):
        head, heads, _ = _heads(own)
        attn, mlp = f"gpt_neox.layers.{layer}.attention.", f"gpt_neox.layers.{layer}.mlp."
        fused, counts = (Rows(attn + "query_key_value", 0, 3 * head),), (("num_attention_heads", 1),)
        yield Site(layer, "attn", heads, 0, fused, attn + "dense", head, counts, cache=2 * head)
        rows, counts = (Rows(mlp + "dense_h_to_4h", 0, 1),), (("intermediate_size", 1),)
        yield Site(layer, "ffn", own.intermediate_size, 0, rows, mlp + "dense_4h_to_h", 1, counts)


def _opt(config: PreTrainedConfig) -> Iterator[Site]:
    """Separate q, k, v and out projections with biases; no gate."""
    for layer, own in enumerate(config.per_layer_config):
        head, heads, _ = _heads(own)
        path = f"model.decoder.layers.{layer}."
        rows = tuple(Rows(f"{path}self_attn.{name}_proj", 0, head) for name in "qkv")
        counts = (("num_attention_heads", 1),)
        yield Site(layer, "attn", heads, 0, rows, path + "self_attn.out_proj", head, counts, cache=2 * head)
        yield Site(layer, "ffn", own.ffn_dim, 0, (Rows(path + "fc1", 0, 1),), path + "fc2", 1, (("ffn_dim", 1),))


def _mixtral(config: PreTrainedConfig) -> Iterator[Site]:
    """Every FFN is a mixture of experts, one site each: experts of one layer may differ in width."""
    for layer, own in enumerate(config.per_layer_config):
        yield _attention(layer, own)
        yield from _experts(layer, own, "intermediate_size")


def _qwen_moe(config: PreTrainedConfig) -> Iterator[Site]:
    """Some layers have a plain FFN, the others experts and in Qwen2 one that all tokens see."""
    for layer, own in enumerate(config.per_layer_config):
        yield _attention(layer, own)
        if has_plain_ffn(own, layer):
            yield _gated(layer, own)
            continue
        yield from _experts(layer, own, "moe_intermediate_size")
        if hasattr(own, "shared_expert_intermediate_size"):
            yield _gated(layer, own, "mlp.shared_expert", "shared_expert_intermediate_size")


def has_plain_ffn(config: PreTrainedConfig, layer: int) -> bool:
    """Whether a layer of a family that mixes them has a plain FFN, no experts."""
    named = layer in getattr(config, "mlp_only_layers", ())
    return named or not config.num_experts or (layer + 1) % getattr(config, "decoder_sparse_step", 1) > 0


def _heads(own: PreTrainedConfig) -> tuple[int, int, int]:
    """Width of a head, KV groups, and query heads of each."""
    head = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    groups = getattr(own, "num_key_value_heads", own.num_attention_heads)
    return head, groups, own.num_attention_heads // max(groups, 1)  # of attention that is gone nothing is asked


def _attention(layer: int, own: PreTrainedConfig) -> Site:
    head, groups, per_group = _heads(own)
    path = f"model.layers.{layer}.self_attn."
    rows = (Rows(path + "q_proj", 0, per_group * head), Rows(path + "k_proj", 0, head), Rows(path + "v_proj", 0, head))
    counts = (("num_attention_heads", per_group), ("num_key_value_heads", 1))
    return Site(layer, "attn", groups, 0, rows, path + "o_proj", per_group * head, counts, cache=2 * head)


def _gated(layer: int, own: PreTrainedConfig, module: str = "mlp", field: str = "intermediate_size") -> Site:
    path = f"model.layers.{layer}.{module}."
    rows = (Rows(path + "gate_proj", 0, 1), Rows(path + "up_proj", 0, 1))
    return Site(layer, "ffn", getattr(own, field), 0, rows, path + "down_proj", 1, ((field, 1),))


def _experts(layer: int, own: PreTrainedConfig, field: str) -> Iterator[Site]:
    """Separate experts; the widths of a pruned layer's that are left are in ``expert_sizes``, those of a dense one in a field."""
    sizes = getattr(own, "expert_sizes", None)
    if sizes is None:
        sizes = [getattr(own, field)] * own.num_experts
    for index, width in enumerate(sizes):
        path = f"model.layers.{layer}.mlp.experts.{index}."
        rows = (Rows(path + "gate_up_proj", 0, 1), Rows(path + "gate_up_proj", width, 1))
        yield Site(layer, f"expert{index}", width, 0, rows, path + "down_proj", 1, (("expert_sizes", 1),))


FAMILIES: dict[str, Callable[[PreTrainedConfig], Iterator[Site]]] = {
    "gemma2": _llama_like,
    "gemma3_text": _llama_like,
    "gpt_neox": _gpt_neox,
    "granite": _llama_like,
    "llama": _llama_like,
    "mistral": _llama_like,
    "mixtral": _mixtral,
    "olmo2": _olmo2,
    "opt": _opt,
    "phi3": _phi3,
    "qwen2": _llama_like,
    "qwen2_moe": _qwen_moe,
    "qwen3": _llama_like,
    "qwen3_moe": _qwen_moe,
    "smollm3": _llama_like,
}

_PRE_NORM = {"attn": "model.layers.{layer}.input_layernorm", "ffn": "model.layers.{layer}.post_attention_layernorm"}
_POST_NORM = {"attn": "model.layers.{layer}.post_attention_layernorm", "ffn": "model.layers.{layer}.post_feedforward_layernorm"}
ENTRANCES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"), _PRE_NORM),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _PRE_NORM | {"expert": _PRE_NORM["ffn"]}),
    **dict.fromkeys(("gemma2", "gemma3_text"), _PRE_NORM | {"ffn": "model.layers.{layer}.pre_feedforward_layernorm"}),
    "gpt_neox": {kind: path.replace("model", "gpt_neox", 1) for kind, path in _PRE_NORM.items()},
    "olmo2": {"attn": "model.layers.{layer}.self_attn.q_proj", "ffn": "model.layers.{layer}.mlp.gate_proj"},
    "opt": {"attn": "model.decoder.layers.{layer}.self_attn_layer_norm", "ffn": "model.decoder.layers.{layer}.final_layer_norm"},
    "opt with norms behind": {"attn": "model.decoder.layers.{layer}.self_attn.q_proj", "ffn": "model.decoder.layers.{layer}.fc1"},
}
"""By role of site, the module whose input is the residual stream before that sub-layer."""
EXITS: dict[str, dict[str, str]] = {
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2"), _POST_NORM),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), dict.fromkeys(("ffn", "expert"), "model.layers.{layer}.mlp")),
}
"""By role of site, the module whose output is added to the stream, where that is not the reader."""
COUNTS: dict[str, dict[str, str]] = {
    "opt": {"num_heads": "num_attention_heads"},
    "phi3": {"num_key_value_heads": "num_key_value_heads", "config.num_attention_heads": "num_attention_heads"},
}
"""What attention splits its matrices by, where that is not their shape: its attribute, and the per-layer field to set it to."""


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
    """``layout_of`` for a model that exists, with its experts separate."""
    family = family_of(model.config)

    def row(name: str) -> int:
        module = linear(model, name)
        return module.in_features + (module.bias is not None)

    sites = []
    for site in FAMILIES[family](model.config):
        if not site.units:  # a sub-layer that is gone
            continue
        reader = linear(model, site.reader)
        if site.units * site.columns != reader.in_features:
            shape = f"{site.units} units of {site.columns} columns"
            raise UnsupportedError(f"{site.reader} must read {shape}; it reads {reader.in_features}; use equal KV groups")
        cost = sum(rows.width * row(rows.module) for rows in site.writers) + sum(rows.width for rows in site.norms)
        sites.append(replace(site, cost=cost + site.columns * reader.out_features))
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
            model = separate_experts(AutoModelForCausalLM.from_config(config))
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


def ends_of(model: PreTrainedModel, site: Site) -> tuple[nn.Module, nn.Module]:
    """The modules at both ends of a site's sub-layer: see ``ENTRANCES`` and ``EXITS``."""
    family = family_of(model.config)
    behind = getattr(model.config, "do_layer_norm_before", True) is False
    entrance = ENTRANCES[f"{family} with norms behind" if behind else family][site.role]
    exit = EXITS.get(family, {}).get(site.role, site.reader)
    return model.get_submodule(entrance.format(layer=site.layer)), model.get_submodule(exit.format(layer=site.layer))


def stack_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers; OPT keeps them one level deeper than others."""
    return getattr(model.base_model, "decoder", model.base_model).layers
