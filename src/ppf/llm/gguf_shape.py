"""Which llama.cpp architecture holds a model, and with which numbers; what none holds is refused here.

layers alike    the family's own: see ``gguf_archs.ARCHITECTURES``
layers differ   deci (Llama, Mistral, Qwen2, Phi-3, Granite), openelm (Qwen3 with tied embeddings); both read their shapes
                layer by layer; the others' own with every layer padded with zeros to the widest
gone            only deci knows a layer without attention, none one without an FFN: units of zeros stand for them
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ppf.errors import UnsupportedError
from ppf.llm.architectures import family_of
from ppf.llm.gguf_archs import ARCHITECTURES, ARCHS, GELU, REQUIRED, SILU, Arch
from ppf.llm.gguf_layers import Layer, Part, layers
from ppf.llm.gguf_rope import context_of, divisors, query_scale, rope_of, window_keys

_EVEN = 32
_SMALLER = 0.99
"""A file must have at most this share of the dense model's weights to be worth writing; norms and biases blur the count."""


@dataclass(frozen=True, eq=False)
class Shape:
    """The geometry of a GGUF file.

    Attributes:
        arch: llama.cpp's name of the architecture.
        heads: Query heads of each layer, as they stand in the file.
        kv_heads: Key and value heads of each layer.
        ffn: FFN channels of each layer, or of each of its experts.
        head_dim: Of queries, keys and values alike, in all layers.
        rope_base: The base of the rotary frequencies.
        rope_factors: Float[P] by which the frequencies are divided; None where they are plain.
        query_scale: By which queries are multiplied, where the model scales attention otherwise than llama.cpp.
        context: Tokens for which file and model answer alike.
        tied: Whether the file has no output head beside the embedding.
        notes: What the user should know.
        turned: How many elements of a head the model's rotary embedding turns.
        embedding_scale: By which embeddings are multiplied.
        reader_scale: By which what is added to the stream is multiplied.
        output_scale: By which the last norm is multiplied.
        shared: Channels of the expert that all tokens see; 0 if there is none.
        eps: Of the norms.
        keys: What this architecture wants beyond that.
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
    turned: int
    embedding_scale: float
    reader_scale: float
    output_scale: float
    shared: int
    eps: float
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def interleaved(self) -> bool:
        """Whether the architecture rotates neighbouring pairs, not halves: rows of queries and keys are then reordered."""
        return ARCHS[self.arch].pairs


@dataclass(frozen=True)
class _Widths:
    """By layer: query heads, key heads, channels of the widest FFN or expert, and of the expert that all tokens see."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    ffn: tuple[int, ...]
    shared: tuple[int, ...]


def shape_of(model: PreTrainedModel) -> Shape:
    """Chooses the architecture.

    Args:
        model: Dense or pruned; only shapes are asked of its matrices, which may be on the meta device.

    Raises:
        UnsupportedError: No architecture of llama.cpp computes what this model does.
    """
    family, config = family_of(model.config), model.config
    _check_family(family, config)
    found = list(layers(model))
    widths, head_dim = _widths(found)
    base, frequencies, scale = rope_of(model)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    name, padded = _arch(family, model, found, base, frequencies, tied)
    arch = ARCHS[name]
    widths, notes = _padded(model, found, head_dim, arch) if padded else (widths, ())
    widths, gone_notes = _filled(widths, arch)
    context, context_notes = context_of(model, arch)
    tied = tied and arch.head != "own"
    return Shape(
        arch=name,
        heads=widths.heads,
        kv_heads=widths.kv_heads,
        ffn=widths.ffn,
        head_dim=head_dim,
        rope_base=base,
        rope_factors=divisors(base, frequencies, head_dim if arch.divisors else 2 * len(frequencies)),
        query_scale=scale * query_scale(model, name, head_dim, widths.heads[0]),
        context=context,
        tied=tied,
        notes=(*notes, *gone_notes, *_uneven(widths, head_dim), *context_notes),
        turned=2 * len(frequencies),
        **_scales(config, tied),
        shared=max(widths.shared),
        eps=float(getattr(config, "rms_norm_eps", None) or config.layer_norm_eps),
        keys={**window_keys(model, arch), **_own_keys(name, config), **_expert_keys(config, found, widths)},
    )


def takes_biases(model: PreTrainedModel) -> bool:
    """Whether its family has an architecture for the biases that compensation adds behind attention and in the FFN."""
    return any(ARCHS[name].biases for name in ARCHITECTURES[family_of(model.config)])


def _scales(config: Any, tied: bool) -> dict[str, float]:
    """Granite's multipliers, by the fields of ``Shape``; ones elsewhere."""
    embedding = float(getattr(config, "embedding_multiplier", 1.0))
    output = float(getattr(config, "logits_scaling", 1.0)) * (embedding if tied else 1.0)  # a tied head carries it, too
    reader = float(getattr(config, "residual_multiplier", 1.0))
    return {"embedding_scale": embedding, "reader_scale": reader, "output_scale": 1 / output}


def _check_family(family: str, config: Any) -> None:
    if family not in ARCHITECTURES:
        held = ", ".join(ARCHITECTURES)
        raise UnsupportedError(f"a GGUF file can hold {held}; {family} came, which llama.cpp lacks; use the folder instead")
    wanted = GELU if ARCHS[ARCHITECTURES[family][0]].gelu else SILU
    came = getattr(config, "hidden_act", None) or config.hidden_activation
    if came not in wanted:
        raise UnsupportedError(f"a GGUF file needs {wanted[0]} as the activation; {came} came; use the folder instead")
    for name, value in REQUIRED.get(family, {}).items():
        if (came := getattr(config, name, value)) != value:
            raise UnsupportedError(f"llama.cpp needs {name} to be {value} in a {family}; {came} came; use the folder instead")


def _widths(found: list[Layer]) -> tuple[_Widths, int]:
    """The widths of each layer, and the one of a head."""
    head_dims = {layer.head_dim for layer in found}
    if len(head_dims) != 1 or min(head_dims) % 2 or min(head_dims) < 2:
        raise UnsupportedError(f"heads must have one even width in all layers; {sorted(head_dims)} came; use the folder instead")
    for index, layer in enumerate(found):
        if layer.heads % max(layer.kv_heads, 1) or (index == 0 and not layer.kv_heads):  # llama.cpp reads its head width there
            came = f"{layer.heads} query heads and {layer.kv_heads} key heads in layer {index}"
            raise UnsupportedError(f"every layer of a GGUF file needs whole KV groups, the first one at least; {came}; keep one")
    counts = {len(layer.ffn) for layer in found}
    if len(counts) != 1:
        raise UnsupportedError(
            f"llama.cpp needs as many experts in all layers; {min(counts)} to {max(counts)} came; use the folder, or prune a study "
            "that was fitted without --depth"
        )
    return _Widths(
        tuple(layer.heads for layer in found),
        tuple(layer.kv_heads for layer in found),
        tuple(max(layer.ffn) for layer in found),
        tuple(layer.shared for layer in found),
    ), head_dims.pop()


def _filled(widths: _Widths, arch: Arch) -> tuple[_Widths, tuple[str, ...]]:
    """Zeros in the place of what is gone, where an architecture cannot do without: one KV group, or a row of channels."""
    heads, kv_heads, ffn = widths.heads, widths.kv_heads, widths.ffn
    if not arch.headless:  # the first layer's group has as many heads as any other
        heads, kv_heads = tuple(of or heads[0] // kv_heads[0] for of in heads), tuple(of or 1 for of in kv_heads)
    if not (gone := ffn.count(0)):
        return replace(widths, heads=heads, kv_heads=kv_heads), ()
    note = f"llama.cpp has no layers without an FFN; {gone} that are gone stand as {_EVEN} channels of zeros in the file"
    return _Widths(heads, kv_heads, tuple(channels or _EVEN for channels in ffn), widths.shared), (note,)


def _arch(
    family: str, model: PreTrainedModel, found: list[Layer], base: float, frequencies: np.ndarray, tied: bool
) -> tuple[str, bool]:
    """llama.cpp's architecture, and whether layers must be padded for it."""
    own, other = ARCHITECTURES[family]
    alike = len({(layer.heads, layer.kv_heads, layer.ffn, layer.shared) for layer in found}) == len(set(found[0].ffn)) == 1
    whole = found[0].heads * found[0].head_dim == model.config.hidden_size
    lacks = {name: _lack(name, model, found, base, frequencies, tied) for name in (own, other)}
    for name in (own, other):
        arch = ARCHS[name]
        if not lacks[name] and (arch.by_layer or (alike and (whole or not arch.whole))):
            return name, False
    if lacks[own]:
        raise UnsupportedError(f"llama.cpp must have an architecture for the model; {family} {lacks[own]}")
    return own, True


def _lack(name: str, model: PreTrainedModel, found: list[Layer], base: float, frequencies: np.ndarray, tied: bool) -> str:
    """What an architecture cannot compute of the model, with the way out; empty if it computes all."""
    arch, turned = ARCHS[name], 2 * len(frequencies)
    ffns = [part for layer in found for ffn in (*layer.ffns, layer.shared_ffn) for part in ffn.values()]
    behind = [*ffns, *(layer.attention["attn_output"] for layer in found)]
    if not arch.biases and any(part.bias is not None and bool(torch.any(part.bias != 0)) for part in behind):
        return "with biases behind attention or in the FFN has none; use the folder, or prune without compensation"
    if arch.fused and not arch.biases and any(layer.attention["attn_q"].bias is not None for layer in found):
        return "with biases of queries has none; use the folder instead"
    stream, width = model.config.hidden_size, found[0].head_dim
    if arch.whole and (stream % width or max(layer.heads for layer in found) * width > stream):
        return f"whose heads of {width} do not fit into its stream of {stream} has none; use the folder instead"
    if not arch.divisors and not arch.partial and turned != width:
        return f"whose rotary embeddings turn {turned} of {width} elements has none; use the folder instead"
    factors = None if arch.divisors else divisors(base, frequencies, turned)
    if factors is not None and np.ptp(factors) > 1e-5 * factors.max():
        return "without plain or linear rotary frequencies has none; remove rope scaling, or use the folder"
    if arch.head == "tied" and not tied:
        return "with an output head of its own has none; use the folder instead"
    turns = getattr(model.config, "no_rope_layers", None) or [1] * len(found)
    if any(bool(turn) == (arch.plain_every > 0 and at % arch.plain_every == 0) for at, turn in enumerate(turns, 1)):
        return f"without rotary embeddings in other layers than each {arch.plain_every}th has none; use the folder instead"
    return ""


def _padded(model: PreTrainedModel, found: list[Layer], head_dim: int, arch: Arch) -> tuple[_Widths, tuple[str, ...]]:
    """The widths of all layers when each is padded to the widest, or to as many heads as ``arch`` wants; and a note of it."""
    family, whole = family_of(model.config), model.config.hidden_size // head_dim if arch.whole else None
    ratios = {layer.heads // layer.kv_heads for layer in found if layer.kv_heads}
    if len(ratios) != 1:
        raise UnsupportedError("KV groups must have as many query heads in all layers; others came; use the folder instead")
    heads, ratio = max(whole or 0, *(layer.heads for layer in found)), ratios.pop()
    ffn, shared = max(max(layer.ffn) for layer in found), max(layer.shared for layer in found)
    added = 0
    head, channel, expert = (max(sizes) for sizes in zip(*map(_unit_sizes, found), strict=True))
    for layer in found:
        added += (heads - layer.heads) * head + sum(ffn - own for own in layer.ffn) * channel + (shared - layer.shared) * expert
    size = added + sum(parameter.numel() for parameter in model.parameters())
    if size > _SMALLER * (getattr(model.config, "ppf_dense_params", None) or math.inf):
        raise UnsupportedError(
            f"llama.cpp holds a {family} with layers alike only; these, padded to the widest, would be as large as before pruning; "
            "use the folder, or prune with a plan of equal ratios"
        )
    share = added / size
    why = "only with queries as wide as its stream" if heads == whole else "with layers alike only"
    note = f"llama.cpp holds this {family} {why}; each layer was padded with zeros, {share:.0%} of the weights in the file"
    return _Widths(*((width,) * len(found) for width in (heads, heads // ratio, ffn, shared))), (note,)


def _unit_sizes(layer: Layer) -> tuple[int, int, int]:
    """Weights of a query head, with its part of keys and values, of a channel, and of a channel of the shared expert."""
    parts = (layer.attention, layer.heads), (layer.ffns[0], layer.ffn[0]), (layer.shared_ffn, layer.shared)
    head, channel, expert = (sum(_by_unit(name, part) for name, part in own.items()) // max(units, 1) for own, units in parts)
    return head, channel, expert


def _by_unit(name: str, part: Part) -> int:
    """Weights of a linear layer that go with its units; a reader's bias does not."""
    reads = name in ("attn_output", "ffn_down")
    return part.weight.numel() + (0 if reads or part.bias is None else part.bias.numel())


def _own_keys(name: str, config: Any) -> dict[str, Any]:
    """Keys of one architecture."""
    if name == "gptneox":
        return {"use_parallel_residual": bool(config.use_parallel_residual)}
    if name == "gemma2":  # which caps at 30 and 50 where nothing is said; at a number this large the cap is the identity
        caps = {"attn_logit_softcapping": config.attn_logit_softcapping, "final_logit_softcapping": config.final_logit_softcapping}
        return {key: float(value or 1e6) for key, value in caps.items()}
    if name == "gemma3" and config.final_logit_softcapping:
        return {"final_logit_softcapping": float(config.final_logit_softcapping)}
    return {}


def _expert_keys(config: Any, found: list[Layer], widths: _Widths) -> dict[str, Any]:
    if not found[0].mixed:
        return {}
    count = len(found[0].ffn)
    keys = {"expert_count": count, "expert_used_count": min(count, int(config.num_experts_per_tok))}
    keys["expert_feed_forward_length"] = widths.ffn[0]
    return {**keys, "expert_shared_feed_forward_length": widths.shared[0]} if widths.shared[0] else keys


def _uneven(widths: _Widths, head_dim: int) -> tuple[str, ...]:
    """A note on widths at which llama.cpp is slow; KV groups can be kept so many at a time that theirs are none."""
    group = widths.heads[0] // widths.kv_heads[0] * head_dim
    kinds = {
        "FFN": (widths.ffn, f"--align {_EVEN}"),
        "attention": ([heads * head_dim for heads in widths.heads], f"--tp {_EVEN // math.gcd(_EVEN, group)}"),
    }
    found = {kind: sum(width % _EVEN != 0 for width in of) for kind, (of, _) in kinds.items()}
    if not any(found.values()):
        return ()
    what = " and ".join(f"{count} of {len(widths.ffn)} {kind} widths" for kind, count in found.items() if count)
    ways = " ".join(way for kind, (_, way) in kinds.items() if found[kind])
    slow = "llama.cpp may be slower at them than on the dense model"
    return (f"{what} are no multiple of {_EVEN}; {slow}; prune with {ways}",)
