"""Model classes whose layers differ in width, as `per_layer_config` in config.json says.

This file is copied into every exported folder and needs transformers (5.14 or newer) alone.
Each class is its family's own; only the layers are built from the config of their own layer.
"""

from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)


class _PerLayerConfig:
    """Head counts need not divide the hidden size: `head_dim` is always given."""

    reader_bias = False  # True: every o_proj and down_proj has a bias, for what removed units gave on average

    def validate_architecture(self):
        return None


class _PerLayerModel:
    """Builds each decoder layer from `config.per_layer_config[i]`."""

    def __init__(self, config):
        config.allow_global_per_layer_attribute_access = True
        super().__init__(config)
        layer = type(self.layers[0])
        self.layers = nn.ModuleList([layer(config.per_layer_config[i], i) for i in range(config.num_hidden_layers)])
        for layer in self.layers if config.reader_bias else ():
            for reader in (layer.self_attn.o_proj, layer.mlp.down_proj):
                reader.bias = nn.Parameter(reader.weight.new_zeros(reader.out_features))
        self.post_init()


class _PerLayerCausalLM:
    """A causal LM around the model above."""

    def __init__(self, config):
        config.allow_global_per_layer_attribute_access = True
        super().__init__(config)
        self.model = self.per_layer_model(config)
        self.post_init()


class PPFLlamaConfig(_PerLayerConfig, LlamaConfig):
    model_type = "ppf_llama"


class PPFLlamaModel(_PerLayerModel, LlamaModel):
    config_class = PPFLlamaConfig


class PPFLlamaForCausalLM(_PerLayerCausalLM, LlamaForCausalLM):
    config_class = PPFLlamaConfig
    per_layer_model = PPFLlamaModel


class PPFMistralConfig(_PerLayerConfig, MistralConfig):
    model_type = "ppf_mistral"


class PPFMistralModel(_PerLayerModel, MistralModel):
    config_class = PPFMistralConfig


class PPFMistralForCausalLM(_PerLayerCausalLM, MistralForCausalLM):
    config_class = PPFMistralConfig
    per_layer_model = PPFMistralModel


class PPFQwen2Config(_PerLayerConfig, Qwen2Config):
    model_type = "ppf_qwen2"


class PPFQwen2Model(_PerLayerModel, Qwen2Model):
    config_class = PPFQwen2Config


class PPFQwen2ForCausalLM(_PerLayerCausalLM, Qwen2ForCausalLM):
    config_class = PPFQwen2Config
    per_layer_model = PPFQwen2Model


class PPFQwen3Config(_PerLayerConfig, Qwen3Config):
    model_type = "ppf_qwen3"


class PPFQwen3Model(_PerLayerModel, Qwen3Model):
    config_class = PPFQwen3Config


class PPFQwen3ForCausalLM(_PerLayerCausalLM, Qwen3ForCausalLM):
    config_class = PPFQwen3Config
    per_layer_model = PPFQwen3Model
