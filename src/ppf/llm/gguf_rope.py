"""Positions in a GGUF file: rotary frequencies, what they scale attention by, and how far back a layer may look."""

from typing import Any

import numpy as np
from transformers import PreTrainedModel

from ppf.errors import UnsupportedError
from ppf.llm.architectures import stack_of
from ppf.llm.gguf_archs import Arch

_STILL = 1e15
"""Divides the frequency of elements that are not turned: their angle is then zero in float32."""
_SLIDING, _FULL = "sliding_attention", "full_attention"


def rope_of(model: PreTrainedModel) -> tuple[float, np.ndarray, float]:
    """Base, frequencies Float[turned / 2] and query scale, read off what the model computes with, whatever rule made it.

    Raises:
        UnsupportedError: Frequencies that change with the length of the text.
    """
    rotary: Any = model.base_model.rotary_emb
    rules = model.config.rope_parameters
    by_kind = _FULL in rules or _SLIDING in rules
    if by_kind and (_FULL not in rules or rules.get(_SLIDING, {}).get("rope_type", "default") != "default"):
        raise UnsupportedError("layers with a window need plain rotary frequencies; others came; use the folder instead")
    kind: Any = getattr(rotary, "rope_type", "default")
    prefix = ""
    if by_kind:
        which = _FULL if _FULL in kind else _SLIDING  # where all layers of the other kind are gone
        kind, rules, prefix = kind[which], rules[which], f"{which}_"
    if kind == "dynamic":
        raise UnsupportedError(
            f"rotary frequencies must not depend on the length of the text; {kind} came; remove it from config.json"
        )
    kept = "original_" if kind == "longrope" else ""  # the others change with the last text that the model saw
    found = getattr(rotary, f"{prefix}{kept}inv_freq").detach().double().cpu().numpy()
    scale = float(getattr(rotary, f"{prefix}attention_scaling", 1.0)) ** 2  # of queries and keys alike; one of them can carry it
    return float(rules["rope_theta"]), found, scale


def divisors(base: float, found: np.ndarray, turned: int) -> np.ndarray | None:
    """Float[turned / 2] by which plain frequencies of that base must be divided; None if they are plain.

    Args:
        base: Of the rotary frequencies.
        found: Those of the model; it may turn fewer elements.
        turned: Elements that llama.cpp turns.
    """
    factors = np.full(turned // 2, _STILL)
    factors[: len(found)] = (base ** (-np.arange(0, turned, 2) / turned))[: len(found)] / found
    return None if np.abs(factors - 1).max() < 1e-5 else factors.astype(np.float32)


def window_keys(model: PreTrainedModel, arch: Arch) -> dict[str, Any]:
    """Keys of an architecture some of whose layers see a window of the text only."""
    kinds = getattr(model.config, "layer_types", None)
    if not arch.windows or kinds is None or _SLIDING not in kinds:
        return {}
    keys: dict[str, Any] = {
        "attention.sliding_window": int(model.config.sliding_window),
        "attention.sliding_window_pattern": [kind == _SLIDING for kind in kinds],
    }
    rules = model.config.rope_parameters
    return {**keys, "rope.freq_base_swa": float(rules[_SLIDING]["rope_theta"])} if _SLIDING in rules else keys


def context_of(model: PreTrainedModel, arch: Arch) -> tuple[int, tuple[str, ...]]:
    """Tokens for which file and model answer alike, and what the user should know of it."""
    config, notes = model.config, []
    context: int = config.max_position_embeddings
    rules = getattr(config, "rope_parameters", None) or {}
    if rules.get("rope_type") == "longrope" and (first := int(rules["original_max_position_embeddings"])) < context:
        context = first
        notes.append(f"the file holds the rotary frequencies of short texts only; its context is {first} tokens")
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = not arch.windows and window is not None and (kinds is None or _SLIDING in kinds)
    if window is not None and slides and window < context:
        context = window
        notes.append(f"llama.cpp has no sliding window for this model; the file's context is that window, {window} tokens")
    return context, tuple(notes)


def query_scale(model: PreTrainedModel, name: str, head_dim: int, heads: int) -> float:
    """What the model scales scores of queries and keys by, as a share of what llama.cpp does.

    Args:
        model: Dense or pruned.
        name: llama.cpp's architecture.
        head_dim: Width of a head.
        heads: Query heads of the file's first layer.
    """
    attention: Any = getattr(stack_of(model)[0], "attention", None) or stack_of(model)[0].self_attn
    theirs: float = head_dim**-0.5
    if (name, len(stack_of(model))) in _SCALED_BY_STREAM:
        theirs = float(model.config.hidden_size // heads) ** -0.5
    return float(attention.scaling) / theirs


_SCALED_BY_STREAM = {("gemma2", 46), ("gemma3", 62)}
"""Architecture and number of layers (27B) at which llama.cpp takes the width of the stream over the heads as a head's."""
