"""The tensors of a GGUF file, under llama.cpp's names and in its order of rows, and the number type of each."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.errors import DamagedError, InputError
from ppf.llm.gguf_shape import Shape, attention_of, ffn_of

BLOCK = {"q8_0": 32, "q4_0": 32, "q4_k_m": 256}
"""Row elements that share a scale; rows of other widths fall back to a finer type."""

_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_ENDS = ("token_embd.weight", "output.weight")
_FLOAT16_MAX = 65504.0


def tensors(model: PreTrainedModel, shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the file, one after another, so that never more than one lies in memory twice.

    Args:
        model: Dense or pruned; not changed.
        shape: What ``shape_of`` said of it.

    Yields:
        Name, and Float[...] in float32 with the input dimension last.

    Raises:
        DamagedError: A weight is not finite.
    """
    for name, array in _all(model, shape):
        if not np.isfinite(array).all():
            raise DamagedError(f"weights must be finite numbers; {name} holds others; restore the model")
        yield name, np.ascontiguousarray(array, dtype=np.float32)


def type_of(name: str, array: np.ndarray, quant: str) -> Any:
    """The ``GGMLQuantizationType`` that a tensor is stored in.

    Norms and biases stay float32. Where a row is no whole number of blocks a matrix is stored as float16, as llama.cpp does.
    With ``q4_0`` the embedding and the output head are ``q8_0``, the next finer type that the gguf package can write (llama.cpp
    takes its Q6_K there).

    Raises:
        InputError: A weight is beyond float16.
    """
    from gguf import GGMLQuantizationType

    if array.ndim == 1:
        return GGMLQuantizationType.F32
    wanted = "Q8_0" if quant == "q4_0" and name in _ENDS else _TYPES[quant]
    kind = "F16" if array.shape[-1] % BLOCK.get(quant, 1) else wanted
    if kind == "F16" and np.abs(array).max() > _FLOAT16_MAX:
        raise InputError(f"weights must lie within float16 for {quant}; {name} does not; use --quant bf16 or f32")
    return GGMLQuantizationType[kind]


def _all(model: PreTrainedModel, shape: Shape) -> Iterator[tuple[str, np.ndarray]]:
    yield "token_embd.weight", _numpy(model.model.embed_tokens.weight)
    yield "output_norm.weight", _numpy(model.model.norm.weight)
    if not shape.tied:
        yield "output.weight", _numpy(model.lm_head.weight)
    if shape.rope_factors is not None and shape.interleaved:
        yield "rope_freqs.weight", shape.rope_factors
    for index, layer in enumerate(model.model.layers):
        for name, array in _layer(layer, shape, index, model.config.hidden_size):
            yield f"blk.{index}.{name}", array


def _layer(layer: nn.Module, shape: Shape, index: int, hidden: int) -> Iterator[tuple[str, np.ndarray]]:
    mlp, ffn = ffn_of(layer) or _no_ffn(hidden), shape.ffn[index]
    if shape.heads[index]:
        yield "attn_norm.weight", _norm(layer.input_layernorm, hidden)
        yield from _attention(attention_of(layer) or _no_attention(hidden, shape), shape, index)
    yield "ffn_norm.weight", _norm(layer.post_attention_layernorm, hidden)
    for name, module in (("ffn_gate", mlp.gate_proj), ("ffn_up", mlp.up_proj)):
        for part, array in _parts(module):
            yield f"{name}.{part}", _padded(array, ffn, 0)
    yield from _reader("ffn_down", mlp.down_proj, ffn)


def _norm(norm: nn.Module, hidden: int) -> np.ndarray:
    """The weight of a norm; that of a sub-layer that is gone went with it."""
    return np.ones(hidden, np.float32) if isinstance(norm, nn.Identity) else _numpy(norm.weight)


def _no_attention(hidden: int, shape: Shape) -> Any:
    """What attention that is gone would be: nothing to be padded."""
    inward, norm = _Part(torch.zeros(0, hidden)), _Part(torch.ones(shape.head_dim))
    norms = {"q_norm": norm, "k_norm": norm}  # of the architectures that cannot do without attention, all have them
    return SimpleNamespace(q_proj=inward, k_proj=inward, v_proj=inward, o_proj=_Part(torch.zeros(hidden, 0)), **norms)


def _no_ffn(hidden: int) -> Any:
    """What an FFN that is gone would be."""
    inward = _Part(torch.zeros(0, hidden))
    return SimpleNamespace(gate_proj=inward, up_proj=inward, down_proj=_Part(torch.zeros(hidden, 0)))


@dataclass(frozen=True, eq=False)
class _Part:
    """A linear module or a norm, as far as it is written."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


def _attention(attn: Any, shape: Shape, index: int) -> Iterator[tuple[str, np.ndarray]]:
    """Queries, keys and values, each or as one matrix, their norms, and the output."""
    heads, kv_heads, width = shape.heads[index], shape.kv_heads[index], shape.head_dim
    normed = hasattr(attn, "q_norm")
    found: dict[str, list[np.ndarray]] = {"weight": [], "bias": []}
    for letter, module, count in (("q", attn.q_proj, heads), ("k", attn.k_proj, kv_heads), ("v", attn.v_proj, kv_heads)):
        for part, array in _parts(module):
            if letter == "q" and not normed:
                array = array * np.float32(shape.query_scale)
            array = _padded(array, count * width, 0)
            if shape.interleaved and letter != "v":
                array = interleaved(array, count)
            found[part].append(array)
            if shape.arch != "openelm":
                yield f"attn_{letter}.{part}", array
    if shape.arch == "openelm":
        yield "attn_qkv.weight", np.concatenate(found["weight"])
    if normed:
        yield "attn_q_norm.weight", _numpy(attn.q_norm.weight) * np.float32(shape.query_scale)
        yield "attn_k_norm.weight", _numpy(attn.k_norm.weight)
    yield from _reader("attn_output", attn.o_proj, heads * width)


def interleaved(rows: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows of each head: transformers turns row i with row i + d/2, llama.cpp here row 2i with row 2i + 1.

    Args:
        rows: Float[heads * d, ...].
        heads: How many there are in this layer.
    """
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return np.swapaxes(halves, 1, 2).reshape(rows.shape)


def _reader(name: str, module: nn.Linear | _Part, columns: int) -> Iterator[tuple[str, np.ndarray]]:
    """A matrix that reads units; a bias of zeros, which some architectures do not know, is left out."""
    for part, array in _parts(module):
        if part == "weight":
            yield f"{name}.weight", _padded(array, columns, 1)
        elif array.any():
            yield f"{name}.bias", array


def _parts(module: nn.Linear | _Part) -> Iterator[tuple[str, np.ndarray]]:
    yield "weight", _numpy(module.weight)
    if module.bias is not None:
        yield "bias", _numpy(module.bias)


def _padded(array: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Zeros behind the last row or column; units of zeros add nothing."""
    missing = [(0, size - array.shape[axis] if at == axis else 0) for at in range(array.ndim)]
    return np.pad(array, missing) if any(after for _, after in missing) else array


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().to("cpu", torch.float32).numpy()
