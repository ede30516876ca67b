"""Is a GGUF file what it should be? It is read again, and where llama-cpp-python is installed, llama.cpp answers from it."""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppf.errors import DamagedError
from ppf.llm.architectures import skeleton
from ppf.llm.gguf_archs import ARCHS
from ppf.llm.gguf_layers import Weights, own_weights
from ppf.llm.gguf_shape import Shape
from ppf.llm.gguf_structure import check_structure
from ppf.llm.gguf_tensors import BLOCK, tensors
from ppf.llm.stored import running_stored
from ppf.llm.weights import first_line

WEIGHT_BOUNDS = {"f32": 0.0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 2e-2, "q4_0": 0.2, "q4_k_m": 0.2}
"""Root mean square error of a stored matrix, as a share of its own root mean square."""
LOGIT_BOUNDS = {"f32": 1e-3, "f16": 1e-2, "bf16": 3e-2, "q8_0": 0.1, "q4_0": 0.5, "q4_k_m": 0.5}
"""Root mean square difference of logits, as a share of their spread: both less their mean, which no probability depends on."""
_TOKENS, _CONTEXT = 32, 256
_ROWS = 1024
TEXTS = (
    "The quick brown fox doesn't jump over 12345 lazy dogs, does it?",
    "def f(x):\n    return {'a': [x ** 2, -1.5e-3]}  # comment\n\n\n\tdone",
    "Größe, naïve café; 日本語のテキスト и кириллица. 🙂",
    "  two  spaces,   three\r\n and an End.\n",
)
"""Texts whose token ids are compared."""


@dataclass(frozen=True)
class Check:
    """What was checked.

    Attributes:
        tensors: Read again and compared with the model's.
        keys: Read again and compared.
        matrices: How many of the tensors are matrices.
        fallbacks: How many matrices are of a width that the type's blocks do not divide, and so in a finer type.
        difference: Between llama.cpp's logits and transformers', see ``LOGIT_BOUNDS``; None if llama.cpp was not there.
        bound: What the difference must not exceed: see ``logit_bound``.
        notes: What the user should know.
    """

    tensors: int
    keys: int
    matrices: int
    fallbacks: int
    difference: float | None
    bound: float
    notes: tuple[str, ...]

    def __str__(self) -> str:
        again = f"{self.tensors} tensors and {self.keys} keys read back and compared"
        if self.difference is None:
            return f"{again}; not loaded in llama.cpp (pip install 'ppf[llamacpp]' for that)"
        return f"{again}; loaded in llama.cpp: logits off transformers' by {self.difference:.1e} (at most {self.bound:g})"


def check(
    file: Path,
    model: PreTrainedModel,
    read: Weights | None,
    tokenizer: PreTrainedTokenizerBase | None,
    shape: Shape,
    keys: dict[str, Any],
    quant: str,
) -> Check:
    """Compares a file with the model that it was made from.

    Args:
        file: The GGUF file.
        model: The model; not changed. Its matrices may be on the meta device.
        read: Gives its tensors; None for its own.
        tokenizer: Its tokenizer, if the file holds it.
        shape: What ``shape_of`` said.
        keys: Every key that must be there.
        quant: Number type of the matrices.

    Raises:
        DamagedError: It does not hold, compute or load what it should.
    """
    counts = reread(file, shape.arch, keys, tensors(model, shape, read), quant)
    if not has_llama_cpp():
        return Check(*counts, None, logit_bound(quant, shape), ())
    difference, notes = answers(file, model, read, tokenizer, shape, quant)
    return Check(*counts, difference, logit_bound(quant, shape), notes)


def reread(
    file: Path, arch: str, keys: dict[str, Any], arrays: Iterator[tuple[str, np.ndarray]], quant: str
) -> tuple[int, int, int, int]:
    """Compares what a file holds, one tensor at a time.

    Args:
        file: The GGUF file.
        arch: llama.cpp's architecture.
        keys: Every key that must be there.
        arrays: Every tensor that must be there.
        quant: Number type of the matrices.

    Returns:
        How many tensors, keys, matrices, and matrices of a width that the type's blocks do not divide it has.

    Raises:
        DamagedError: It holds other ones.
    """
    from gguf import GGUFReader

    check_structure(file)
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise _damaged(f"it cannot be read, {first_line(error)}") from error
    for key, value in {**keys, "general.architecture": arch}.items():
        found = reader.fields[key].contents() if key in reader.fields else None
        if found != (float(np.float32(value)) if isinstance(value, float) else _rounded(value)):
            raise _damaged(f"key {key} differs")
    stored = {tensor.name: tensor for tensor in reader.tensors}
    matrices = fallbacks = 0
    for name, array in arrays:
        _compare(file, name, array, stored.pop(name, None), quant)
        matrices += array.ndim > 1
        fallbacks += array.ndim > 1 and array.shape[-1] % BLOCK.get(quant, 1) != 0
    if stored:
        raise _damaged(f"tensor {min(stored)} is too many")
    return len(reader.tensors), len(keys) + 1, matrices, fallbacks


def _rounded(value: Any) -> Any:
    """A list of floats as it comes back from float32; any other value as it is."""
    return [float(np.float32(one)) for one in value] if isinstance(value, list) and isinstance(value[0], float) else value


def _compare(file: Path, name: str, array: np.ndarray, stored: Any, quant: str) -> None:
    """Maps one tensor and compares some rows at a time: what the reader itself has mapped would stay in memory."""
    from gguf.quants import dequantize

    if stored is None or tuple(int(size) for size in reversed(stored.shape)) != array.shape:
        raise _damaged(f"tensor {name} is missing or of another shape")
    mapped = np.memmap(file, stored.data.dtype, "r", stored.data_offset, stored.data.shape)
    wanted, data = array.reshape(-1, array.shape[-1]), mapped.reshape(-1, mapped.shape[-1])
    error = size = 0.0
    for start in range(0, len(wanted), _ROWS):
        ours, theirs = wanted[start : start + _ROWS], data[start : start + _ROWS]
        error += float(np.square(dequantize(theirs, stored.tensor_type).reshape(ours.shape) - ours, dtype=np.float64).sum())
        size += float(np.square(ours, dtype=np.float64).sum())
    bound = WEIGHT_BOUNDS[quant] if array.ndim > 1 else 0.0
    if not error**0.5 <= bound * size**0.5:
        raise _damaged(f"tensor {name} differs from the model's by more than {quant} rounds")


def answers(
    file: Path, model: PreTrainedModel, read: Weights | None, tokenizer: PreTrainedTokenizerBase | None, shape: Shape, quant: str
) -> tuple[float, tuple[str, ...]]:
    """How far llama.cpp's logits are from those of transformers in float32, and what differs in the token ids of texts.

    Raises:
        DamagedError: The file does not load, or the logits are further off than ``quant`` may take them.
    """
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, min(_TOKENS, shape.context)).tolist()
    texts = [] if tokenizer is None else list(TEXTS)
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "logits.npy"
        request = {"file": str(file), "ids": ids, "texts": texts, "out": str(out), "context": _CONTEXT}
        answer = in_llama_cpp("logits", {**request, "threads": torch.get_num_threads()})
        theirs = np.load(out, allow_pickle=False)
    shell = skeleton(model.config)
    with torch.inference_mode(), running_stored(shell, read or own_weights(model)):
        ours = shell(input_ids=torch.tensor([ids]), use_cache=False).logits[0].numpy()
    difference = max(distance(found, ours) for found in theirs)
    if not difference <= (bound := logit_bound(quant, shape)):
        raise _damaged(f"llama.cpp's logits are off by {difference:.1e} of their spread, more than {bound:g}")
    expected = [] if tokenizer is None else [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    wrong = [text for text, ours, theirs in zip(texts, expected, answer["texts"], strict=True) if ours != theirs]
    note = f"llama.cpp splits {len(wrong)} of {len(texts)} test texts into other tokens than transformers does"
    return difference, (f"{note}, the first is {wrong[0][:24]!r}",) if wrong else ()


def logit_bound(quant: str, shape: Shape) -> float:
    """What logits may differ by. llama.cpp rounds GELU to float16: then no file is finer than one of that type."""
    return max(LOGIT_BOUNDS[quant], LOGIT_BOUNDS["f16"]) if ARCHS[shape.arch].gelu else LOGIT_BOUNDS[quant]


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Root mean square difference of logits as a share of their spread; Float[T, V] both."""
    found, wanted = (of.astype(np.float64) - of.mean(axis=-1, keepdims=True, dtype=np.float64) for of in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python is installed; it is not loaded."""
    return importlib.util.find_spec("llama_cpp") is not None


def in_llama_cpp(task: str, request: dict[str, Any]) -> dict[str, Any]:
    """Has llama.cpp do something in a process of its own.

    Raises:
        DamagedError: It refused the file, or the process ended.
    """
    command = [sys.executable, "-m", "ppf.llm.llama_cpp_process", task]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        raise _damaged(f"llama.cpp stopped with code {done.returncode}: {lines[-1][:200]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _damaged(what: str) -> DamagedError:
    return DamagedError(
        f"a GGUF file must hold and answer what its model does; {what}; nothing was written, use the folder instead"
    )
