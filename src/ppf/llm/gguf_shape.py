"""Which llama.cpp architecture holds a model, and with which numbers; what none holds is refused here.

layers alike    llama (Llama, Mistral), qwen2, qwen3: the family's own
layers differ   deci (Llama, Mistral, Qwen2), openelm (Qwen3 with tied embeddings); both read their shapes layer by layer
                qwen3 with every layer padded with zeros to the widest (other Qwen3: no architecture has its output head)
gone            only deci knows a layer without attention, none one without an FFN: units of zeros stand for them
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.errors import UnsupportedError
from ppf.llm.architectures import family_of
from ppf.llm.pruned_model import NoAttention, NoFFN

ARCHITECTURES = {
    "llama": ("llama", "deci"), "mistral": ("llama", "deci"), "qwen2": ("qwen2", "deci"), "qwen3": ("qwen3", "openelm"),
}  # fmt: skip
"""By family, llama.cpp's architectures for layers that are alike and for layers that differ."""
_INTERLEAVED = {"llama", "deci"}
_EVEN = 32
_MOVING_ROPE = {"dynamic", "longrope"}


@dataclass(frozen=True, eq=False)
class Shape:
    """The geometry of a GGUF file.

    Attributes:
        arch: llama.cpp's name of the architecture.
        heads: Query heads of each layer, as they stand in the file.
        kv_heads: Key and value heads of each layer.
        ffn: FFN channels of each layer.
        head_dim: Of queries, keys and values alike, in all layers.
        rope_base: The base of the rotary frequencies.
        rope_factors: Float[head_dim / 2] by which the frequencies are divided; None where they are plain.
        query_scale: By which queries are multiplied, for rotary embeddings that scale attention.
        context: Tokens for which file and model answer alike.
        tied: Whether the output head is the embedding.
        notes: What the user should know.
    """

    arch: str
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    head_dim: int
    rope_base: float
    rope_factors: np.ndarray | None
    query_scale: float
    context: int
    tied: bool
    notes: tuple[str, ...]

    @property
    def interleaved(self) -> bool:
        """Whether the architecture rotates neighbouring pairs, not halves: rows of queries and keys are then reordered."""
        return self.arch in _INTERLEAVED


def shape_of(model: PreTrainedModel) -> Shape:
    """Chooses the architecture.

    Raises:
        UnsupportedError: No architecture of llama.cpp computes what this model does.
    """
    family, config = family_of(model.config), model.config
    if family not in ARCHITECTURES:
        held = ", ".join(ARCHITECTURES)
        raise UnsupportedError(
            f"a GGUF file with layers that differ can hold {held}; {family} came, which llama.cpp cannot; use the folder instead"
        )
    if config.hidden_act != "silu":
        raise UnsupportedError(f"a GGUF file needs silu as the activation; {config.hidden_act} came; use the folder instead")
    heads, kv_heads, ffn, head_dim = _widths(model)
    notes: list[str] = []
    if gone := ffn.count(0):
        notes.append(f"llama.cpp has no layers without an FFN; {gone} that are gone stand as {_EVEN} channels of zeros in the file")
        ffn = tuple(channels or _EVEN for channels in ffn)
    base, factors, scale = _rope(model, head_dim)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    alike = all(len(set(widths)) == 1 for widths in (heads, kv_heads, ffn))
    if family == "qwen3":
        arch = _qwen3_arch(model, alike, tied, factors)
        heads, kv_heads = _with_heads(heads, kv_heads)
        if arch == "qwen3" and not alike:
            heads, kv_heads, ffn = _widest(heads, kv_heads, ffn)
            notes.append(
                "no architecture of llama.cpp holds such a Qwen3 with layers that differ; each was padded with zeros to the widest"
            )
    else:
        arch = ARCHITECTURES[family][0] if alike and _fits_own(model, family, heads[0] * head_dim, factors) else "deci"
    context, note = _context(config)
    if uneven := sum(width % _EVEN != 0 for width in (*ffn, *(of * head_dim for of in heads))):
        what = f"{uneven} of {2 * len(ffn)} attention and FFN widths are no multiple of {_EVEN}"
        notes.append(f"{what}; llama.cpp may be slower at them than on the dense model; prune with --align {_EVEN}")
    return Shape(arch, heads, kv_heads, ffn, head_dim, base, factors, scale, context, tied, (*notes, *note))


def _widths(model: PreTrainedModel) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], int]:
    """Heads, key heads and channels of each layer, 0 where they are gone, and the one width of a head."""
    layers = model.model.layers
    attentions, ffns = [attention_of(layer) for layer in layers], [ffn_of(layer) for layer in layers]
    head_dims = {int(attention.head_dim) for attention in attentions if attention}
    if len(head_dims) != 1 or min(head_dims) % 2 or min(head_dims) < 2:
        raise UnsupportedError(f"heads must have one even width in all layers; {sorted(head_dims)} came; use the folder instead")
    head_dim = head_dims.pop()
    heads = tuple(attention.q_proj.out_features // head_dim if attention else 0 for attention in attentions)
    kv_heads = tuple(attention.k_proj.out_features // head_dim if attention else 0 for attention in attentions)
    ffn = tuple(one.gate_proj.out_features if one else 0 for one in ffns)
    for layer, (of, kv, channels) in enumerate(zip(heads, kv_heads, ffn, strict=True)):
        # llama.cpp reads its head width from layer 0 and drops the attention of a layer without channels, silently
        gone = layer > 0 and not attentions[layer]
        if (min(of, kv) < 1 and not gone) or of % max(kv, 1) or (channels < 1 and ffns[layer]):
            came = f"{of} query heads, {kv} key heads and {channels} channels in layer {layer}"
            raise UnsupportedError(f"every layer of a GGUF file needs a channel and whole KV groups; {came}; keep one of each")
    return heads, kv_heads, ffn, head_dim


def attention_of(layer: nn.Module) -> Any:
    """Its attention; None where it is gone."""
    return None if isinstance(layer.self_attn, NoAttention) else layer.self_attn


def ffn_of(layer: nn.Module) -> Any:
    """Its FFN; None where it is gone."""
    return None if isinstance(layer.mlp, NoFFN) else layer.mlp


def _with_heads(heads: tuple[int, ...], kv_heads: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """One KV group where attention is gone: the first layer's, whose group has as many heads as any other."""
    return tuple(of or heads[0] // kv_heads[0] for of in heads), tuple(kv or 1 for kv in kv_heads)


def _rope(model: PreTrainedModel, head_dim: int) -> tuple[float, np.ndarray | None, float]:
    """Base, divisors and query scale, read off the frequencies that the model computes with, whatever rule made them."""
    rotary = model.model.rotary_emb
    kind = str(getattr(rotary, "rope_type", "default"))
    if kind in _MOVING_ROPE:
        raise UnsupportedError(
            f"rotary frequencies must not depend on the length of the text; {kind} came; remove it from config.json"
        )
    base = float(model.config.rope_parameters["rope_theta"])
    found = rotary.inv_freq.detach().double().cpu().numpy()
    plain = base ** (-np.arange(0, head_dim, 2) / head_dim)
    if found.shape != plain.shape:
        came = f"{2 * len(found)} of {head_dim}"
        raise UnsupportedError(f"rotary embeddings must turn whole heads; {came} elements turn; use the folder instead")
    factors = plain / found
    scale = float(getattr(rotary, "attention_scaling", 1.0)) ** 2  # of queries and keys alike; one of them can carry it
    return base, None if np.abs(factors - 1).max() < 1e-5 else factors.astype(np.float32), scale


def _qwen3_arch(model: PreTrainedModel, alike: bool, tied: bool, factors: np.ndarray | None) -> str:
    """Both architectures with query and key norms lack biases behind the readers and divisors of single frequencies."""
    if _reader_biases(model):
        what = "Qwen3 with biases behind attention or FFN"
        raise UnsupportedError(
            f"llama.cpp must have an architecture for the model; {what} has none; use the folder, or prune without compensation"
        )
    if factors is not None and np.ptp(factors) > 1e-5 * factors.max():
        raise UnsupportedError("a Qwen3 in a GGUF file needs plain or linear rotary frequencies; others came; remove rope scaling")
    biased = any(attention.q_proj.bias is not None for attention in map(attention_of, model.model.layers) if attention)
    return "openelm" if tied and not alike and not biased else "qwen3"


def _fits_own(model: PreTrainedModel, family: str, attention: int, factors: np.ndarray | None) -> bool:
    """llama reads all that deci reads; qwen2 knows no such bias or divisor, and its attention is as wide as the stream."""
    plain = factors is None and not _reader_biases(model) and attention == model.config.hidden_size
    return ARCHITECTURES[family][0] == "llama" or plain


def _reader_biases(model: PreTrainedModel) -> bool:
    """Whether an attention or FFN output has a bias that is not zero."""
    layers = model.model.layers
    readers = [attention.o_proj for attention in map(attention_of, layers) if attention]
    readers += [ffn.down_proj for ffn in map(ffn_of, layers) if ffn]
    return any(reader.bias is not None and bool(torch.any(reader.bias != 0)) for reader in readers)


def _widest(*widths: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    heads, kv_heads, _ = widths
    if len({of // kv for of, kv in zip(heads, kv_heads, strict=True)}) != 1:
        raise UnsupportedError("KV groups must have as many query heads in all layers; others came; use the folder instead")
    return tuple((max(values),) * len(values) for values in widths)


def _context(config: object) -> tuple[int, tuple[str, ...]]:
    """llama.cpp attends to the whole text in all these architectures: longer than a sliding window, answers would differ."""
    context: int = config.max_position_embeddings  # type: ignore[attr-defined]
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = window is not None and (kinds is None or "sliding_attention" in kinds)
    if window is None or not slides or window >= context:
        return context, ()
    return window, (f"llama.cpp has no sliding window for this model; the file's context is that window, {window} tokens",)
