"""Which model families there are and what works for each, asked of the code that does it."""

from dataclasses import dataclass

from ppf.llm.architectures import FAMILIES
from ppf.llm.depth import may_go
from ppf.llm.gguf_archs import ARCHITECTURES
from ppf.llm.pruned_model import PRUNED


@dataclass(frozen=True)
class Support:
    """What works for a family.

    Attributes:
        family: Its ``model_type`` in config.json.
        units: What can be removed, in words.
        depth: Which sub-layers can go as a whole (``--depth``), and whether experts can; the attention of the first layer cannot.
        gguf: llama.cpp's architectures for layers that are alike and for layers that differ; None where it has none.
        vllm: Whether an exported folder declares what vLLM's Transformers backend asks of a model.
    """

    family: str
    units: tuple[str, ...]
    depth: tuple[str, ...]
    gguf: tuple[str, str] | None
    vllm: bool


def supported() -> tuple[Support, ...]:
    """All families, by name."""
    return tuple(
        Support(family, _units(family), _depth(family), ARCHITECTURES.get(family), _in_vllm(family)) for family in sorted(FAMILIES)
    )


def _in_vllm(family: str) -> bool:
    """What the class declares; not of separate experts, for which vLLM puts one fused module of equal widths."""
    config_class, _, lm_class = PRUNED[family]
    mixed = any(site.role == "expert" for site in FAMILIES[family](config_class()))
    return bool(lm_class.is_backend_compatible()) and not mixed


def _depth(family: str) -> tuple[str, ...]:
    """Of the sites that the family has with its default config; of OPT those of its usual order of norms."""
    roles = {site.role for site in FAMILIES[family](PRUNED[family][0]()) if may_go(site)}
    words = {"attn": "attention", "ffn": "FFN", "expert": "experts"}
    return tuple(word for role, word in words.items() if role in roles)


def _units(family: str) -> tuple[str, ...]:
    """Read off the sites that the family has with its default config."""
    config = PRUNED[family][0]()
    heads = "KV groups" if hasattr(config, "num_key_value_heads") else "heads"
    words = {"attn": heads, "ffn": "FFN channels", "expert": "expert channels"}
    return tuple(dict.fromkeys(words[site.role] for site in FAMILIES[family](config)))
