"""Which model families there are and what works for each, as data: neither torch nor transformers is needed to list them.

The tests ask the code that does the work, and compare.
"""

from dataclasses import dataclass

from ppf.llm.gguf_archs import ARCHITECTURES


@dataclass(frozen=True)
class Support:
    """What works for a family.

    Attributes:
        family: Its ``model_type`` in config.json.
        units: What can be removed, in words.
        depth: Which sub-layers can go as a whole (``--depth``), and whether experts can; the attention of the first layer cannot.
        gguf: llama.cpp's architectures for layers that are alike and for layers that differ; None where it has none.
        vllm: Whether an exported folder declares what vLLM's Transformers backend asks of a model; not of separate experts, for
            which vLLM puts one fused module of equal widths.
    """

    family: str
    units: tuple[str, ...]
    depth: tuple[str, ...]
    gguf: tuple[str, str] | None
    vllm: bool


_GROUPED = ("KV groups", "FFN channels"), ("attention", "FFN"), True
_SINGLE = ("heads", "FFN channels"), ("attention", "FFN"), True
_EXPERTS = ("KV groups", "expert channels"), ("attention", "experts"), False
_SHARED = ("KV groups", "expert channels", "FFN channels"), ("attention", "experts"), False

KINDS = {
    "gemma2": _GROUPED,
    "gemma3_text": _GROUPED,
    "gpt_neox": _SINGLE,
    "granite": _GROUPED,
    "llama": _GROUPED,
    "mistral": _GROUPED,
    "mixtral": _EXPERTS,
    "olmo2": _GROUPED,
    "opt": _SINGLE,
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen2_moe": _SHARED,
    "qwen3": _GROUPED,
    "qwen3_moe": _EXPERTS,
    "smollm3": _GROUPED,
}
"""By family ``units``, ``depth`` and ``vllm`` of a ``Support``, for its default config; of OPT with its usual order of norms."""


def supported() -> tuple[Support, ...]:
    """All families, by name."""
    return tuple(
        Support(family, units, depth, ARCHITECTURES.get(family), vllm) for family, (units, depth, vllm) in sorted(KINDS.items())
    )
