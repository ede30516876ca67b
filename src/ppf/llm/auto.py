"""What transformers' auto classes must know to load an exported folder without remote code."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from ppf.llm.pruned_model import PRUNED


def register() -> None:
    """Lets transformers' auto classes load exported folders without remote code; more than once does no harm."""
    for config_class, model_class, lm_class in PRUNED.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        AutoModel.register(config_class, model_class, exist_ok=True)
        AutoModelForCausalLM.register(config_class, lm_class, exist_ok=True)
