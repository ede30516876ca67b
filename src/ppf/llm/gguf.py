"""A model as one GGUF file for llama.cpp, checked before it gets its name.

model ── shape_of ─► architecture, widths ─┐
      ── tensors ──► names, order of rows ─┼─► file of a temporary name ─(quantise)─► check ─► its own name
tokenizer ── vocabulary ─► keys ───────────┘
"""

import importlib.util
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppf.artifact import check_writable
from ppf.errors import InputError, ResourceError
from ppf.llm import gguf_check
from ppf.llm.gguf_archs import ARCHS
from ppf.llm.gguf_check import Check, check, compare, in_llama_cpp
from ppf.llm.gguf_layers import Weights
from ppf.llm.gguf_shape import Shape, shape_of
from ppf.llm.gguf_tensors import BLOCK, tensors, type_of
from ppf.llm.gguf_tokenizer import Vocabulary, vocabulary

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_k_m": 15}
"""llama.cpp's number for each kind of file."""
_FOUR_BITS = ("q4_0", "q4_k_m")
_QUANTISATION_VERSION = 2


@dataclass(frozen=True)
class Written:
    """What a file holds and what was checked.

    Attributes:
        arch: llama.cpp's architecture.
        quant: Number type of the matrices.
        bytes: Size of the file.
        tokenizer: What became of the tokenizer.
        check: What was checked.
        notes: What the user should know.
    """

    arch: str
    quant: str
    bytes: int
    tokenizer: str
    check: Check
    notes: tuple[str, ...]


def write_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    quant: str,
    name: str,
    force: bool = False,
    read: Weights | None = None,
) -> Written:
    """Writes a GGUF file, holding one tensor at a time beside the model.

    Args:
        model: Dense or pruned; not changed. Its matrices may be on the meta device.
        tokenizer: Its own.
        path: The file; it appears only after its check passed.
        quant: One of ``FILE_TYPES``.
        name: The model's name inside the file.
        force: Replace a GGUF file of that name.
        read: Gives its tensors; None for its own.

    Raises:
        InputError: The file exists, or its place is none for a file.
        UnsupportedError: No architecture of llama.cpp computes what the model does.
        DamagedError: The check failed; nothing is left behind.
        ResourceError: A package is missing, or the file cannot be written.
    """
    check_gguf(path, quant, force)
    shape, words = shape_of(model), vocabulary(tokenizer, model.config.vocab_size)
    keys = _keys(model, shape, words, quant, name)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
            file = _made(Path(work), model, read, shape, keys, quant)
            found = check(file, model, read, tokenizer, shape, keys, quant)
            check_gguf(path, quant, force)  # again: writing takes long, and another process may have come first
            size = _publish(file, path)
    except OSError as error:
        if error.errno is None:
            raise
        raise ResourceError(f"{path} must be writable; {error.strerror}; free the disk or choose another place") from error
    return Written(shape.arch, quant, size, words.label, found, (*shape.notes, *words.notes, *found.notes))


def check_gguf(path: Path, quant: str, force: bool, new_folder: Path | None = None) -> None:
    """Refuses a file that could not be written, at once rather than after the work.

    Args:
        path: The file.
        quant: Number type of the matrices.
        force: A GGUF file of that name may be there.
        new_folder: One that will be there before the file is written.

    Raises:
        InputError: Something of that name is there, or its folder is not.
        ResourceError: A package is missing, or the place cannot be written.
    """
    path = Path(path)
    if importlib.util.find_spec("gguf") is None:
        raise ResourceError("a GGUF file needs the package gguf; it is missing; pip install 'ppf[gguf]'")
    if quant == "q4_k_m" and not gguf_check.has_llama_cpp():
        raise ResourceError(
            "q4_k_m needs llama.cpp's quantisation; llama-cpp-python is missing; pip install 'ppf[llamacpp]', or use --quant q4_0"
        )
    if path.is_dir() or path.is_symlink():
        raise InputError(f"{path} must be a new file; a folder or a link is there; name a file, such as {path.name}.gguf")
    if path.exists() and not force:
        raise InputError(f"{path} must be a new file; it exists; choose another name, or add --force to replace it")
    if path.exists() and not _is_gguf(path):
        raise InputError(f"--force replaces GGUF files alone; {path} is none; choose another name, or remove it yourself")
    if path.parent.resolve() != new_folder and not path.parent.is_dir():
        raise InputError(f"{path} must lie in a folder that exists; {path.parent} is none; make it, or choose another place")
    check_writable(path)


def _is_gguf(path: Path) -> bool:
    """Whether a file begins as one; an empty one has nothing to lose."""
    try:
        with path.open("rb") as file:
            return file.read(4) in (b"GGUF", b"")
    except OSError:
        return False


def _keys(model: PreTrainedModel, shape: Shape, words: Vocabulary, quant: str, name: str) -> dict[str, Any]:
    """Every key of the file. llama.cpp takes what is missing from layer 0, wrongly for a pruned model: nothing is."""
    config, arch = model.config, shape.arch
    own: dict[str, Any] = {
        "vocab_size": int(config.vocab_size),
        "context_length": int(shape.context),
        "embedding_length": int(config.hidden_size),
        "block_count": len(shape.ffn),
        "feed_forward_length": _per_layer(shape.ffn),
        "attention.head_count": _per_layer(shape.heads),
        "attention.head_count_kv": _per_layer(shape.kv_heads),
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        f"attention.{'layer_norm' if ARCHS[arch].biased else 'layer_norm_rms'}_epsilon": shape.eps,
        "rope.dimension_count": shape.head_dim if ARCHS[arch].divisors else shape.turned,
        "rope.freq_base": shape.rope_base,
        **shape.keys,
    }
    if shape.rope_factors is not None and not ARCHS[arch].divisors:
        own |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(shape.rope_factors[0])}
    general: dict[str, Any] = {"general.name": name, "general.file_type": FILE_TYPES[quant]}
    if quant in BLOCK:
        general["general.quantization_version"] = _QUANTISATION_VERSION
    return {**general, **{f"{arch}.{key}": value for key, value in own.items()}, **words.keys}


def _per_layer(widths: tuple[int, ...]) -> int | list[int]:
    """One number where all layers are alike; numbers of numpy, which the gguf package refuses, become Python's."""
    return int(widths[0]) if len(set(widths)) == 1 else [int(width) for width in widths]


def _write(file: Path, model: PreTrainedModel, read: Weights | None, shape: Shape, keys: dict[str, Any], quant: str) -> None:
    """Writes keys, the list of tensors, and the tensors. They are made twice, for the list and for the data, but never kept."""
    from gguf import GGUFWriter
    from gguf.quants import quant_shape_to_byte_shape, quantize

    writer = GGUFWriter(file, shape.arch)
    try:
        for key, value in keys.items():
            _adder(writer, value)(key, value)
        kinds = []
        for name, array in tensors(model, shape, read):
            kinds.append(type_of(name, array, quant))
            size = quant_shape_to_byte_shape(array.shape, kinds[-1])
            writer.add_tensor_info(name, array.shape, array.dtype, math.prod(size), raw_dtype=kinds[-1])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for kind, (_, array) in zip(kinds, tensors(model, shape, read), strict=True):
            writer.write_tensor_data(quantize(array, kind))
    finally:
        writer.close()


def _made(work: Path, model: PreTrainedModel, read: Weights | None, shape: Shape, keys: dict[str, Any], quant: str) -> Path:
    """The file, not yet checked. Rounding to 4 bits could hide a wrong order of rows: llama.cpp answers before it, too."""
    file, first = work / "model.gguf", _lossless(model.dtype)
    if quant in _FOUR_BITS and gguf_check.has_llama_cpp():
        _write(file, model, read, shape, {**keys, "general.file_type": FILE_TYPES[first]}, first)
        compare(file, model, read, [], shape, first)
    if quant == "q4_k_m":
        return _quantised(file, quant)
    _write(file, model, read, shape, keys, quant)
    return file


def _adder(writer: Any, value: Any) -> Callable[[str, Any], None]:
    """The writer's method for a value; True is an int, too, and comes first."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    return writer.add_array if isinstance(value, list) else kinds[type(value)]


def _lossless(dtype: torch.dtype) -> str:
    """The type from which llama.cpp quantises: the checkpoint's own."""
    return {torch.bfloat16: "bf16", torch.float16: "f16"}.get(dtype, "f32")


def _quantised(file: Path, quant: str) -> Path:
    """Another file beside it, made by llama.cpp in a process of its own."""
    out = file.with_name("quantised.gguf")
    in_llama_cpp("quantise", {"file": str(file), "out": str(out), "type": FILE_TYPES[quant]})
    file.unlink()
    return out


def _publish(file: Path, path: Path) -> int:
    """Gives a whole file its name, in one step; its bytes."""
    with open(file, "rb") as done:
        os.fsync(done.fileno())
    mask = os.umask(0o022)
    os.umask(mask)
    file.chmod(0o666 & ~mask)
    size = file.stat().st_size
    os.replace(file, path)
    return size
