"""What AutoConfig knows of the pruned models until one is asked for: a name that becomes the real class then.

The real classes need the models' code, which cannot be imported while transformers' own modules are still being imported.
"""

import importlib
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

FAMILIES = (
    "gemma2", "gemma3_text", "gpt_neox", "granite", "llama", "mistral", "mixtral", "olmo2", "opt", "phi3", "qwen2", "qwen2_moe",
    "qwen3", "qwen3_moe", "smollm3",
)  # fmt: skip
"""Those of ``pruned_model``, which cannot be asked yet."""


class _StandIn(PreTrainedConfig):
    """Makes configs of the real class; there is never one of its own."""

    def __new__(cls, *args: Any, **options: Any) -> Any:
        return _real(cls.model_type)(*args, **options)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        return _real(cls.model_type).from_dict(config_dict, **options)


def register_stand_ins() -> None:
    """Tells AutoConfig, and nothing else, of the pruned models."""
    for model_type in (f"ppf_{family}" for family in FAMILIES):
        AutoConfig.register(model_type, type("PPFStandIn", (_StandIn,), {"model_type": model_type}), exist_ok=True)


def _real(model_type: str) -> Any:
    """The real class, which all auto classes know from now on."""
    importlib.import_module("ppf.llm.auto").register()
    return importlib.import_module("ppf.llm.pruned_model").PRUNED[model_type.removeprefix("ppf_")][0]
