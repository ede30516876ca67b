"""The tensors of a GGUF file, under llama.cpp's names and in its order of rows, and the number type of each."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ppf.errors import DamagedError, InputError
from ppf.llm.gguf_archs import ARCHS
from ppf.llm.gguf_layers import Layer, Part, Weights, ends, layers
from ppf.llm.gguf_shape import Shape

BLOCK = {"q8_0": 32, "q4_0": 32, "q4_k_m": 256}
"""Row elements that share a scale; rows of other widths fall back to a finer type."""

_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_ENDS = ("token_embd.weight", "output.weight")
_ROUTER = "ffn_gate_inp"
_HEAD_NORMS = ("attn_q_norm", "attn_k_norm")
_FLOAT16_MAX = 65504.0


def tensors(model: PreTrainedModel, shape: Shape, read: Weights | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file, one after another, so that never more than one lies in memory twice.

    Args:
        model: Dense or pruned; not changed, and its matrices may be on the meta device.
        shape: What ``shape_of`` said of it.
        read: Gives its tensors; None for its own.

    Yields:
        Name, and Float[...] in float32 with the input dimension last.

    Raises:
        DamagedError: A weight is not finite.
    """
    for name, array in _all(model, shape, read):
        if not np.isfinite(array).all():
            raise DamagedError(f"weights must be finite numbers; {name} holds others; restore the model")
        yield name, np.ascontiguousarray(array, dtype=np.float32)


def type_of(name: str, array: np.ndarray, quant: str) -> Any:
    """The ``GGMLQuantizationType`` that a tensor is stored in.

    Norms, biases and routers stay float32. Where a row is no whole number of blocks a matrix is float16, as llama.cpp does it.
    With ``q4_0`` the embedding and the output head are ``q8_0``, the next finer type that the gguf package can write (llama.cpp
    takes its Q6_K there).

    Raises:
        InputError: A weight is beyond float16.
    """
    from gguf import GGMLQuantizationType

    if array.ndim == 1 or _ROUTER in name:
        return GGMLQuantizationType.F32
    wanted = "Q8_0" if quant == "q4_0" and name in _ENDS else _TYPES[quant]
    kind = "F16" if array.shape[-1] % BLOCK.get(quant, 1) else wanted
    if kind == "F16" and np.abs(array).max() > _FLOAT16_MAX:
        raise InputError(f"weights must lie within float16 for {quant}; {name} does not; use --quant bf16 or f32")
    return GGMLQuantizationType[kind]


def _all(model: PreTrainedModel, shape: Shape, read: Weights | None) -> Iterator[tuple[str, np.ndarray]]:
    biased, (embedding, norm, head) = ARCHS[shape.arch].biased, ends(model, read)
    yield "token_embd.weight", _scaled(embedding, shape.embedding_scale)
    yield from _named("output_norm", norm, biased, shape.output_scale)
    if not shape.tied:
        yield "output.weight", _scaled(head, 1.0)
    del embedding, head  # or they would stay in memory as long as the layers are read
    if shape.rope_factors is not None and ARCHS[shape.arch].divisors:
        yield "rope_freqs.weight", shape.rope_factors
    for index, layer in enumerate(layers(model, read)):
        for name, array in _layer(layer, shape, index):
            yield f"blk.{index}.{name}", array


def _layer(layer: Layer, shape: Shape, index: int) -> Iterator[tuple[str, np.ndarray]]:
    ffn, biased = shape.ffn[index], ARCHS[shape.arch].biased
    for name, part in layer.others.items():
        if name not in _HEAD_NORMS and (shape.heads[index] or name != "attn_norm"):
            yield from _named(name, part, biased and part.weight.ndim == 1)
    if shape.heads[index]:
        yield from _attention(layer, shape, index)
    if not layer.mixed:
        yield from _ffn(layer.ffns[0], ffn, shape, "")
    else:
        experts = [dict(_ffn(one, ffn, shape, "_exps")) for one in layer.ffns]
        for name in list(experts[0]):
            yield name, np.stack([expert.pop(name) for expert in experts])
    if layer.shared_ffn:
        yield from _ffn(layer.shared_ffn, shape.shared, shape, "_shexp")


def _ffn(parts: dict[str, Part], width: int, shape: Shape, suffix: str) -> Iterator[tuple[str, np.ndarray]]:
    """The matrices of one FFN at the width of the file."""
    for name, part in parts.items():
        if name == "ffn_down":
            yield from _reader(name + suffix, part, width, shape)
        else:
            for kind, array in _named(name + suffix, part, ARCHS[shape.arch].biased):
                yield kind, _padded(array, width, 0)


def _attention(layer: Layer, shape: Shape, index: int) -> Iterator[tuple[str, np.ndarray]]:
    """Queries, keys and values, each or as one matrix, their norms, and the output."""
    heads, kv_heads, width, arch = shape.heads[index], shape.kv_heads[index], shape.head_dim, ARCHS[shape.arch]
    counts = {"attn_q": (layer.heads, heads), "attn_k": (layer.kv_heads, kv_heads), "attn_v": (layer.kv_heads, kv_heads)}
    found: dict[str, list[np.ndarray]] = {"weight": [], "bias": []}
    for name, (own, count) in counts.items():
        norm = layer.others.get(f"{name}_norm")
        scale = shape.query_scale if name == "attn_q" else 1.0
        spread = (
            (count / own) ** 0.5 if norm is not None and arch.across and own else 1.0
        )  # padding would make the mean square smaller
        if norm is not None:
            array = _scaled(norm.weight, scale / spread)
            yield f"{name}_norm.weight", _padded(array, count * width, 0) if arch.across else array
            scale = spread
        for kind, array in _named(name, layer.attention[name], arch.biased, scale):
            array = _padded(array, count * width, 0)
            if shape.interleaved and name != "attn_v":
                array = interleaved(array, count, shape.turned)
            found[kind.rpartition(".")[2]].append(array)
            if not arch.fused:
                yield kind, array
    for kind, arrays in found.items():
        if arch.fused and arrays:
            yield f"attn_qkv.{kind}", np.concatenate(arrays)
    yield from _reader("attn_output", layer.attention["attn_output"], heads * width, shape)


def interleaved(rows: np.ndarray, heads: int, turned: int | None = None) -> np.ndarray:
    """Reorders the rows of each head: transformers turns row i with row i + d/2, llama.cpp here row 2i with row 2i + 1.

    Args:
        rows: Float[heads * d, ...].
        heads: How many there are in this layer.
        turned: Of how many rows of each head; by default d. The others stay where they are.
    """
    by_head = rows.reshape(heads, -1, *rows.shape[1:])
    first = by_head[:, :turned]
    pairs = np.swapaxes(first.reshape(heads, 2, -1, *rows.shape[1:]), 1, 2).reshape(first.shape)
    return np.concatenate([pairs, by_head[:, first.shape[1] :]], axis=1).reshape(rows.shape)


def _reader(name: str, part: Part, columns: int, shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    """A matrix that reads units; a bias of zeros, which some architectures do not know, is left out."""
    biased = ARCHS[shape.arch].biased
    for kind, array in _named(name, part, biased, shape.reader_scale):
        if kind.endswith("weight"):
            yield kind, _padded(array, columns, 1)
        elif biased or array.any():
            yield kind, array


def _named(name: str, part: Part, biased: bool = False, scale: float = 1.0) -> Iterator[tuple[str, np.ndarray]]:
    """Weight and bias times ``scale``; with ``biased`` a bias of zeros where there is none."""
    yield f"{name}.weight", _scaled(part.weight, scale)
    if part.bias is not None:
        yield f"{name}.bias", _scaled(part.bias, scale)
    elif biased:
        yield f"{name}.bias", np.zeros(len(part.weight), np.float32)


def _padded(array: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Zeros behind the last row or column; units of zeros add nothing."""
    missing = [(0, size - array.shape[axis] if at == axis else 0) for at in range(array.ndim)]
    return np.pad(array, missing) if any(after for _, after in missing) else array


def _scaled(tensor: torch.Tensor, scale: float) -> np.ndarray:
    array = tensor.to("cpu", torch.float32).numpy()
    return array if scale == 1 else array * np.float32(scale)
