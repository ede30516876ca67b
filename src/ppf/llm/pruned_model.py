"""Model classes whose layers differ in width, as `per_layer_config` in config.json says.

This file is copied into every exported folder and needs transformers (5.14 or newer) alone.
Each class is its family's own; only the layers are built from the config of their own layer.
"""

import torch
import transformers as hf
from torch import nn

READERS = ("o_proj", "out_proj", "dense", "down_proj", "fc2", "dense_4h_to_h")
"""The linear modules that removed units fed."""
_ATTENTION, _FFN = ("self_attn", "attention"), ("mlp", "fc2")
_PARTS = {
    "attn": (*_ATTENTION, "input_layernorm", "self_attn_layer_norm"),
    "ffn": (*_FFN, "fc1", "final_layer_norm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
}
_WIDTHS = {"num_attention_heads": "attn", "num_key_value_heads": "attn", "intermediate_size": "ffn", "ffn_dim": "ffn"}
"""Fields of a layer's config, and the sub-layer that is gone where they are 0."""


class NoAttention(nn.Module):
    """In the place of attention that is gone: adds nothing to the stream. Its part of a cache only counts the tokens."""

    def __init__(self, index):
        super().__init__()
        self.index = index

    def forward(self, hidden_states, **options):
        cache = options.get("past_key_values", options.get("layer_past"))
        if cache is not None:
            keys = hidden_states.new_empty(hidden_states.shape[0], 1, hidden_states.shape[1], 0)
            cache.update(keys, keys, self.index)
        return torch.zeros_like(hidden_states), None


class NoFFN(nn.Module):
    """In the place of an FFN that is gone: adds nothing to the stream."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def parts_of(layer, part):
    """Names of the modules of a layer's attention (`part` is "attn") or FFN ("ffn"), their norms included."""
    behind = "attn" if hasattr(layer, "post_feedforward_layernorm") else "ffn"  # what the norm of this name belongs to
    names = (*_PARTS[part], "post_attention_layernorm") if part == behind else _PARTS[part]
    return [name for name in names if hasattr(layer, name)]


def without(layer, part, index):
    """By name what takes the place of each module of a sub-layer that is gone."""
    special = {**dict.fromkeys(_ATTENTION, NoAttention(index)), **dict.fromkeys(_FFN, NoFFN())}
    return {name: special.get(name) or nn.Identity() for name in parts_of(layer, part)}


class _PerLayerConfig:
    """Head counts need not divide the hidden size: `head_dim` is always given."""

    reader_bias = False  # True: every reader has a bias, for what removed units gave on average

    def validate_architecture(self):
        return None


class _PerLayerModel:
    """Builds each decoder layer from `config.per_layer_config[i]`."""

    def __init__(self, config):
        config.allow_global_per_layer_attribute_access = True
        super().__init__(config)
        stack = getattr(self, "decoder", self)  # OPT keeps its layers one level deeper
        kind = type(stack.layers[0])
        stack.layers = nn.ModuleList([self.built(kind, config, index) for index in range(config.num_hidden_layers)])
        for name, reader in stack.layers.named_modules() if config.reader_bias else ():
            if name.rpartition(".")[2] in READERS and isinstance(reader, nn.Linear):
                reader.bias = nn.Parameter(reader.weight.new_zeros(reader.out_features))
        self.post_init()

    def built(self, kind, config, index):
        own = config.per_layer_config[index]
        empty = [field for field in _WIDTHS if getattr(own, field, None) == 0]
        for field in empty:  # no family builds a sub-layer of nothing: one of the least width makes room
            setattr(own, field, 1)
        layer = self.layer(kind, own, index)
        for part in {_WIDTHS[field] for field in empty}:
            for name, other in without(layer, part, index).items():
                setattr(layer, name, other)
        return layer

    def layer(self, kind, own, index):
        return kind(own, index)


class _SquareModel(_PerLayerModel):
    """For families whose code ties the width of attention to the hidden size: it is built whole, then narrowed."""

    def layer(self, kind, own, index):
        whole = own.hidden_size // own.head_dim
        heads, own.num_attention_heads = own.num_attention_heads, whole
        layer = kind(own, index)
        attention = layer.attention if hasattr(layer, "attention") else layer.self_attn
        attention.num_heads = heads
        for name, linear in list(attention.named_children()):
            rows, columns = linear.out_features, linear.in_features
            rows, columns = (rows, columns // whole * heads) if name in READERS else (rows // whole * heads, columns)
            setattr(attention, name, nn.Linear(columns, rows, bias=linear.bias is not None))
        return layer


class Expert(nn.Module):
    """A gated FFN."""

    def __init__(self, hidden, width, act_fn):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden, 2 * width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)
        self.act_fn = act_fn

    def forward(self, states):
        gate, up = self.gate_up_proj(states).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class Experts(nn.ModuleList):
    """Experts that differ in width, called as transformers' own are; each sees the tokens that were sent to it."""

    def __init__(self, hidden, widths, act_fn):
        super().__init__([Expert(hidden, width, act_fn) for width in widths])

    def forward(self, states, top_k_index, top_k_weights):
        total = torch.zeros_like(states)
        for index, expert in enumerate(self):
            tokens, places = torch.where(top_k_index == index)
            if len(tokens):
                part = expert(states[tokens]) * top_k_weights[tokens, places, None]
                total.index_add_(0, tokens, part.to(total.dtype))
        return total


class _MixtureModel(_PerLayerModel):
    """For families whose code keeps the experts of a layer in one tensor, and so at one width: they are separate here.

    Layers may differ in how many they have; where those are fewer than a token is sent to, it is sent to all of them.
    """

    def layer(self, kind, own, index):
        layer = kind(own, index)
        if hasattr(layer.mlp, "experts"):
            fused, gate = layer.mlp.experts, layer.mlp.gate
            sizes = getattr(own, "expert_sizes", [fused.intermediate_dim] * fused.num_experts)
            layer.mlp.experts, count = Experts(fused.hidden_dim, sizes, fused.act_fn), len(sizes)
            gate.weight = nn.Parameter(gate.weight.new_empty(count, fused.hidden_dim))
            gate.num_experts, gate.top_k = count, min(gate.top_k, count)
        return layer


class _PerLayerCausalLM:
    """A causal LM around the model above."""

    def __init__(self, config):
        config.allow_global_per_layer_attribute_access = True
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.per_layer_model(config))
        self.post_init()


def _classes(config, model, lm, base=_PerLayerModel):
    """A family's config, model and causal LM; each is called as its parent is, behind PPF."""

    def child(parent, mixin, **body):
        return type(f"PPF{parent.__name__}", (mixin, parent), {"__module__": __name__, **body})

    config = child(config, _PerLayerConfig, model_type=f"ppf_{config.model_type}")
    model = child(model, base, config_class=config)
    return config, model, child(lm, _PerLayerCausalLM, config_class=config, per_layer_model=model)


PRUNED = {
    "gemma2": _classes(hf.Gemma2Config, hf.Gemma2Model, hf.Gemma2ForCausalLM),
    "gemma3_text": _classes(hf.Gemma3TextConfig, hf.Gemma3TextModel, hf.Gemma3ForCausalLM),
    "gpt_neox": _classes(hf.GPTNeoXConfig, hf.GPTNeoXModel, hf.GPTNeoXForCausalLM, _SquareModel),
    "granite": _classes(hf.GraniteConfig, hf.GraniteModel, hf.GraniteForCausalLM),
    "llama": _classes(hf.LlamaConfig, hf.LlamaModel, hf.LlamaForCausalLM),
    "mistral": _classes(hf.MistralConfig, hf.MistralModel, hf.MistralForCausalLM),
    "mixtral": _classes(hf.MixtralConfig, hf.MixtralModel, hf.MixtralForCausalLM, _MixtureModel),
    "olmo2": _classes(hf.Olmo2Config, hf.Olmo2Model, hf.Olmo2ForCausalLM),
    "opt": _classes(hf.OPTConfig, hf.OPTModel, hf.OPTForCausalLM, _SquareModel),
    "phi3": _classes(hf.Phi3Config, hf.Phi3Model, hf.Phi3ForCausalLM),
    "qwen2": _classes(hf.Qwen2Config, hf.Qwen2Model, hf.Qwen2ForCausalLM),
    "qwen2_moe": _classes(hf.Qwen2MoeConfig, hf.Qwen2MoeModel, hf.Qwen2MoeForCausalLM, _MixtureModel),
    "qwen3": _classes(hf.Qwen3Config, hf.Qwen3Model, hf.Qwen3ForCausalLM),
    "qwen3_moe": _classes(hf.Qwen3MoeConfig, hf.Qwen3MoeModel, hf.Qwen3MoeForCausalLM, _MixtureModel),
    "smollm3": _classes(hf.SmolLM3Config, hf.SmolLM3Model, hf.SmolLM3ForCausalLM),
}
"""Per family the config, model and causal LM whose layers differ in width."""

globals().update({kind.__name__: kind for kinds in PRUNED.values() for kind in kinds})  # `auto_map` in config.json names them
