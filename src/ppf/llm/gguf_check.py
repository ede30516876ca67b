"""Is a GGUF file what it should be? It is read again, and where llama-cpp-python is installed, llama.cpp answers from it."""

import importlib.util
import json
import math
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
from ppf.llm.pydocs import first_document
from ppf.llm.stored import running_stored
from ppf.llm.weights import first_line

WEIGHT_BOUNDS = {"f32": 0.0, "f16": 1e-3, "bf16": 4e-3, "q8_0": 2e-2, "q4_0": 0.2, "q4_k_m": 0.2}
"""Root mean square error of a stored matrix, as a share of its own root mean square."""
LOGIT_BOUNDS = {"f32": 1e-3, "f16": 1e-2, "bf16": 3e-2, "q8_0": 0.1, "q4_0": 0.5, "q4_k_m": 0.5}
"""Root mean square difference of logits, as a share of their spread: both less their mean, which no probability depends on."""
_TOKENS, _TEXT_TOKENS, _CONTEXT = 32, 128, 256
_ROWS = 1024
_TEST_BUCKET = 2
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
        bound: What the difference must not exceed: see ``logit_bound``. What those of ``log_ppl`` differ by must not, either.
        log_ppl: Of a text of the standard library's documentation, nats/token: llama.cpp's and transformers'; None if it was
            not there, or knows no two tokens of it.
        notes: What the user should know.
    """

    tensors: int
    keys: int
    matrices: int
    fallbacks: int
    difference: float | None
    bound: float
    log_ppl: tuple[float, float] | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        again = f"{self.tensors} tensors and {self.keys} keys read back and compared"
        if self.difference is None:
            return f"{again}; not loaded in llama.cpp (pip install 'ppf[llamacpp]' for that)"
        loaded = f"{again}; loaded in llama.cpp: logits off transformers' by {self.difference:.1e} (at most {self.bound:g})"
        if self.log_ppl is None:
            return loaded
        theirs, ours = (math.exp(value) for value in self.log_ppl)
        return f"{loaded}, perplexity of a text {theirs:.2f}, transformers' {ours:.2f}"


def check(
    file: Path,
    model: PreTrainedModel,
    read: Weights | None,
    tokenizer: PreTrainedTokenizerBase,
    shape: Shape,
    keys: dict[str, Any],
    quant: str,
) -> Check:
    """Compares a file with the model that it was made from.

    Args:
        file: The GGUF file.
        model: The model; not changed. Its matrices may be on the meta device.
        read: Gives its tensors; None for its own.
        tokenizer: Its tokenizer.
        shape: What ``shape_of`` said.
        keys: Every key that must be there.
        quant: Number type of the matrices.

    Raises:
        DamagedError: It does not hold, compute or load what it should.
    """
    counts = reread(file, shape.arch, keys, tensors(model, shape, read), quant)
    if not has_llama_cpp():
        return Check(*counts, None, logit_bound(quant, shape), None, ())
    difference, log_ppl = compare(file, model, read, text_ids(tokenizer), shape, quant)
    notes = () if keys["tokenizer.ggml.model"] == "no_vocab" else _splits(file, tokenizer)
    return Check(*counts, difference, logit_bound(quant, shape), log_ppl, notes)


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
        if found != _rounded(value):
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
    """Floats as they come back from float32, in a list too; any other value as it is."""
    if isinstance(value, list):
        return [_rounded(one) for one in value]
    return float(np.float32(value)) if isinstance(value, float) else value


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


def compare(
    file: Path, model: PreTrainedModel, read: Weights | None, text: list[int], shape: Shape, quant: str
) -> tuple[float, tuple[float, float] | None]:
    """Runs llama.cpp beside transformers in float32: random tokens, all at once and one by one, and a text.

    Args:
        file: The GGUF file.
        model: The model; not changed.
        read: Gives its tensors; None for its own.
        text: Token ids; none measures no perplexity.
        shape: What ``shape_of`` said.
        quant: Number type of the matrices.

    Returns:
        How far the logits are apart, and the log-perplexities of the text, nats/token; see ``Check``.

    Raises:
        DamagedError: The file does not load, or they are further apart than ``quant`` may take them.
    """
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, min(_TOKENS, shape.context)).tolist()
    text = text[: min(_TEXT_TOKENS, shape.context)]
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "logits.npz"
        request = {"file": str(file), "ids": ids, "text": text, "out": str(out), "context": _CONTEXT}
        in_llama_cpp("logits", {**request, "threads": torch.get_num_threads()})
        theirs = dict(np.load(out, allow_pickle=False))
    ours = _logits(model, read, ids, text)
    difference = max(distance(found, ours[0, : len(ids)]) for found in (theirs["whole"], theirs["steps"]))
    if not difference <= (bound := logit_bound(quant, shape)):
        raise _damaged(f"llama.cpp's logits are off by {difference:.1e} of their spread, more than {bound:g}")
    if len(text) < 2:
        return difference, None
    log_ppl = _log_ppl(theirs["text"], text), _log_ppl(ours[1, : len(text)], text)
    if not abs(log_ppl[0] - log_ppl[1]) <= bound:
        raise _damaged(f"llama.cpp's log-perplexity of a text is {log_ppl[0]:.4f}, transformers' {log_ppl[1]:.4f}")
    return difference, log_ppl


def _logits(model: PreTrainedModel, read: Weights | None, *texts: list[int]) -> np.ndarray:
    """Float[texts, T, V] of transformers, in one pass, for each may read all weights from files."""
    ids = torch.zeros((len(texts), max(map(len, texts))), dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.tensor(text)
    shell = skeleton(model.config)
    with torch.inference_mode(), running_stored(shell, read or own_weights(model)):
        return shell(input_ids=ids, use_cache=False).logits.numpy()


def _log_ppl(logits: np.ndarray, text: list[int]) -> float:
    """Nats/token of the tokens after the first."""
    wide: np.ndarray = logits[:-1].astype(np.float64)
    return float((np.logaddexp.reduce(wide, axis=-1) - wide[np.arange(len(wide)), text[1:]]).mean())


def text_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens of a real text, which lies on every Python installation."""
    return list(tokenizer(first_document(_TEST_BUCKET), add_special_tokens=False)["input_ids"])[:_TEXT_TOKENS]


def _splits(file: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """What differs in the token ids of texts."""
    theirs = in_llama_cpp("tokens", {"file": str(file), "texts": TEXTS})["texts"]
    ours = [list(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS]
    wrong = [text for text, one, other in zip(TEXTS, ours, theirs, strict=True) if one != other]
    note = f"llama.cpp splits {len(wrong)} of {len(TEXTS)} test texts into other tokens than transformers does"
    return (f"{note}, the first is {wrong[0][:24]!r}",) if wrong else ()


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
        f"a GGUF file must hold and answer what its model does; {what}; no file was written, use the folder instead"
    )
