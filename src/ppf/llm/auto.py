"""What transformers' auto classes must know to load an exported folder without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ppf.llm import pruned_model

PRUNED: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel], type[PreTrainedModel]]] = {
    "llama": (pruned_model.PPFLlamaConfig, pruned_model.PPFLlamaModel, pruned_model.PPFLlamaForCausalLM),
    "mistral": (pruned_model.PPFMistralConfig, pruned_model.PPFMistralModel, pruned_model.PPFMistralForCausalLM),
    "qwen2": (pruned_model.PPFQwen2Config, pruned_model.PPFQwen2Model, pruned_model.PPFQwen2ForCausalLM),
    "qwen3": (pruned_model.PPFQwen3Config, pruned_model.PPFQwen3Model, pruned_model.PPFQwen3ForCausalLM),
}
"""Per family the config, model and causal LM whose layers differ in width."""


def register() -> None:
    """Lets transformers' auto classes load exported folders without remote code; more than once does no harm."""
    for config_class, model_class, lm_class in PRUNED.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, lm_class, exist_ok=True)
