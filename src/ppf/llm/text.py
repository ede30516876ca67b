"""From the name of a text to token blocks for calibration, search and test that never overlap.

    pydocs            buckets 0 | 1 | 2 of the documentation inside CPython
    self              sampled from the dense model, three seeds
    FILE.txt          20 % | 40 % | 40 % of each of 20 stretches, so that a text that changes on its way is the same in all parts
    FILE.jsonl        its documents (field `text`), by a hash of their words: 20 % | 40 % | 40 %; one alone is cut as a .txt
    FILE.parquet      likewise, column `text`
    wikitext2 c4      from the hub: train (by hash, 1/3 | 2/3) for calibration and search, test for test

The part for search is dealt out twice: most of its blocks are for validation, where static pruning chooses among its best.

A separate test text replaces the test part; then calibration and search share the whole of a file, 1/3 and 2/3. Of the
other texts they stay what they are.
"""

import hashlib
import importlib
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppf.artifact import load_artifact, save_artifact
from ppf.errors import InputError, PPFError, ResourceError
from ppf.llm import pydocs
from ppf.llm.placement import entry_of

PARTS = ("calibration", "search", "test")
"""Of a text, as it is split."""
_SHARES = {"calibration": 0.2, "search": 0.4, "test": 0.4}
_HUB = {  # repository, configuration, and what joins rows that are lines; None where rows are documents
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", ""),
    "c4": ("allenai/c4", "en", None),
}
_STRETCHES, _BLOCKS_OF_STRETCH = 20, 20
_HUB_ROWS = 20_000
_LINES = 200
_DEALT = ("calibration", "search", "validation", "test")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SAMPLED_BLOCKS = {"calibration": 64, "search": 256, "test": 128}


@dataclass(frozen=True, eq=False)
class Text:
    """Token blocks of one text.

    Attributes:
        name: As the user called it.
        calibration: Int[B, L], for importance.
        search: Int[B, L], for measuring masks.
        validation: Int[B, L], for choosing among the best; none if the text is short.
        test: Int[B, L], for reported figures only.
    """

    name: str
    calibration: np.ndarray
    search: np.ndarray
    validation: np.ndarray
    test: np.ndarray

    @property
    def digest(self) -> str:
        """Hash of all tokens and their arrangement."""
        parts = [getattr(self, part) for part in _DEALT]
        return hashlib.sha256(b"".join(repr(part.shape).encode() + part.astype("<i8").tobytes() for part in parts)).hexdigest()[:32]

    def save(self, path: Path, fingerprint: str) -> None:
        """Writes the artefact."""
        save_artifact(path, "text", fingerprint, {part: getattr(self, part) for part in _DEALT}, name=self.name)

    @classmethod
    def load(cls, path: Path, fingerprint: str) -> "Text":
        """Reads the artefact.

        Raises:
            DamagedError: Not whole, or of another study.
        """
        arrays, header = load_artifact(path, "text", fingerprint)
        return cls(header["name"], *(arrays[part] for part in _DEALT))


@dataclass(frozen=True)
class TextSizes:
    """How much of each part is used, in tokens; less if the text has less.

    Attributes:
        seq_len: Tokens a block.
        calibration: Tokens for importance.
        search: Tokens for each measured mask.
        validation: Tokens for choosing among the best.
        test: Tokens for each reported figure.
    """

    seq_len: int
    calibration: int
    search: int
    validation: int
    test: int


def load_text(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    sizes: TextSizes,
    seed: int,
    model: PreTrainedModel | None = None,
    test_name: str | None = None,
) -> Text:
    """Token blocks of all three parts.

    Args:
        name: A corpus or a file, as in the module's table.
        tokenizer: Of the model.
        sizes: How much is wanted.
        seed: Which blocks are taken where there are more than wanted, and what ``self`` samples.
        model: Needed for ``self``.
        test_name: Another text for the test part.

    Raises:
        InputError: No such text, too short for one block a part, or a test text that is the first one.
        ResourceError: An optional package or the network is missing.
    """
    if test_name is not None and _same(name, test_name):
        raise InputError(
            f"a test text must be another text; {test_name!r} came twice; leave --test-text out: a part is kept for tests"
        )
    if name == "self":
        if model is None:
            raise InputError("text self must be sampled from a model; none is at hand; name another text")
        streams = {part: sample_text(model, tokenizer, sizes, part, seed) for part in PARTS}
    else:
        streams = _streams(name, tokenizer, sizes.seq_len, apart=test_name is not None)
    if test_name is not None:
        streams["test"] = whole_text(test_name, tokenizer)
    wanted = {"calibration": sizes.calibration, "search": sizes.search + sizes.validation, "test": sizes.test}
    parts = {part: take_blocks(streams[part], sizes.seq_len, wanted[part], seed, f"{name} ({part})") for part in PARTS}
    search, validation = _dealt(parts["search"], max(1, sizes.search // sizes.seq_len))
    return Text(name, parts["calibration"], search, validation, parts["test"])


def _dealt(blocks: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """``count`` blocks, evenly spread, and the others."""
    count = min(count, len(blocks))
    first: np.ndarray = np.zeros(len(blocks), dtype=bool)
    first[((np.arange(count) + 0.5) * len(blocks) / count).astype(np.int64)] = True
    return blocks[first], blocks[~first]


def whole_text(name: str, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Int[T]: all of a text that is used for tests alone: the test part of a corpus, or the whole of a file.

    Raises:
        InputError: No such text.
    """
    if name == "pydocs":
        return _join(pydocs.documents(2), tokenizer)
    if name in _HUB:
        return _join(_hub_documents(name, "test"), tokenizer)
    if name == "self":
        raise InputError("a test text must come from outside the model; self came; name a corpus or a file")
    return _join(_file_documents(Path(name)), tokenizer)


def take_blocks(stream: np.ndarray, seq_len: int, tokens: int | None, seed: int, name: str) -> np.ndarray:
    """Cuts a stream into blocks and takes some of them, evenly spread with a seeded start.

    Args:
        stream: Int[T].
        seq_len: Tokens a block; the tail that fills no block is left out.
        tokens: How many are wanted; None takes all.
        seed: Shifts which blocks are taken.
        name: For the message.

    Returns:
        Int[B, L], in the order of the text.

    Raises:
        InputError: Not one whole block.
    """
    count = len(stream) // seq_len
    if count < 1:
        raise InputError(
            f"text {name} must fill a block of {seq_len} tokens; it has {len(stream)}; give more text or a smaller --seq-len"
        )
    blocks = stream[: count * seq_len].reshape(count, seq_len)
    wanted = count if tokens is None else max(1, min(count, tokens // seq_len))
    start = np.random.default_rng(seed).random()
    return blocks[np.floor((np.arange(wanted) + start) * count / wanted).astype(np.int64)]


@torch.inference_mode()
def sample_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sizes: TextSizes, part: str, seed: int) -> np.ndarray:
    """Int[T]: text drawn from the model itself at temperature 1, one block after another, seeded by part."""
    first = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    generator = torch.Generator().manual_seed(seed * len(PARTS) + PARTS.index(part))
    tokens = getattr(sizes, part) + (sizes.validation if part == "search" else 0)
    wanted = -(-tokens // sizes.seq_len)
    blocks, ids, cache = min(wanted, _SAMPLED_BLOCKS[part]), None, None
    ids = torch.full((blocks, 1), first, device=entry_of(model))
    step = ids
    for _ in range(sizes.seq_len - 1):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        step = torch.multinomial(output.logits[:, -1].float().softmax(-1).cpu(), 1, generator=generator).to(ids.device)
        ids = torch.cat([ids, step], dim=1)
    return ids.reshape(-1).cpu().numpy().astype(np.int64)


def _streams(name: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, apart: bool) -> dict[str, np.ndarray]:
    """The token stream of each part; ``apart`` means that the test part comes from elsewhere."""
    if name == "pydocs":
        return {part: _join(pydocs.documents(bucket), tokenizer) for bucket, part in enumerate(PARTS)}
    if name in _HUB:
        train = _split_documents(_hub_documents(name, "train"), tokenizer, apart=True)
        return {**train, "test": np.array([], dtype=np.int64) if apart else whole_text(name, tokenizer)}
    documents = _file_documents(Path(name))
    if len(documents) > 1:
        return _split_documents(documents, tokenizer, apart)
    return _cut_in_turn(_join(documents, tokenizer), seq_len, _shares(apart))


def _cut_in_turn(stream: np.ndarray, seq_len: int, shares: list[tuple[str, float]]) -> dict[str, np.ndarray]:
    """Deals each of up to 20 stretches of a text, Int[T], out to all parts; cuts lie between blocks of ``seq_len`` tokens.

    A stretch has 20 blocks at least, so that a short text is one and is cut in order.
    """
    ends = np.cumsum([share for _, share in shares])[:-1]
    count = max(1, min(_STRETCHES, len(stream) // (_BLOCKS_OF_STRETCH * seq_len)))
    starts: np.ndarray = np.arange(count + 1) * (len(stream) // seq_len) // count * seq_len
    starts[-1] = len(stream)  # what fills no block
    cut = []
    for start, stop in itertools.pairwise(starts.tolist()):
        bounds = start + np.rint(ends * (stop - start) / seq_len).astype(np.int64) * seq_len
        cut.append(np.split(stream[start:stop], bounds - start))
    return {part: np.concatenate(pieces) for (part, _), pieces in zip(shares, zip(*cut, strict=True), strict=True)}


def _shares(apart: bool) -> list[tuple[str, float]]:
    parts = [part for part in PARTS if not (apart and part == "test")]
    total = sum(_SHARES[part] for part in parts)
    return [(part, _SHARES[part] / total) for part in parts]


def _split_documents(documents: list[str], tokenizer: PreTrainedTokenizerBase, apart: bool) -> dict[str, np.ndarray]:
    """Equal documents fall into the same part, so that no text is in two."""
    shares = _shares(apart)
    ends = np.cumsum([share for _, share in shares])
    groups: dict[str, list[str]] = {part: [] for part, _ in shares}
    for document in documents:
        place = int(hashlib.sha256(" ".join(document.split()).encode()).hexdigest()[:12], 16) / 16**12
        groups[shares[min(int(np.searchsorted(ends, place, side="right")), len(shares) - 1)][0]].append(document)
    return {part: _join(group, tokenizer) for part, group in groups.items()}


def _join(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Token stream with an end-of-text token behind each document, where the tokenizer has one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not documents:
        return np.array([], dtype=np.int64)
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    return np.concatenate([np.array(ids + end, dtype=np.int64) for ids in encoded])


def _file_documents(path: Path) -> list[str]:
    """The documents of a file; a .txt file is one."""
    if not _is_file(path):
        known = ", ".join(["pydocs", "self", *_HUB])
        raise InputError(f"a text must be one of {known} or a file; {str(path)!r} is neither; check the spelling")
    if path.suffix not in _READERS:
        raise InputError(f"a text file must end in {', '.join(_READERS)}; {path.name!r} came; convert it")
    try:
        documents = _READERS[path.suffix](path)
    except PPFError:
        raise
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text; {error.reason} at byte {error.start}; convert it") from error
    except OSError as error:
        raise ResourceError(f"{path} must be readable; {error}; check it") from error
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise InputError(f"{path} must hold documents, each with a field 'text'; {reason}; convert it") from error
    if not all(isinstance(document, str) and not _SURROGATE.search(document) for document in documents):
        raise InputError(f"{path} must hold Unicode strings in 'text'; something else came; convert it")
    return [document for document in documents if document.strip()]


def _read_txt(path: Path) -> list[str]:
    return [path.read_text(encoding="utf-8")]


def _read_jsonl(path: Path) -> list[str]:
    # Not splitlines(): JSON strings may hold U+2028 and its like as they are.
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line.strip()]


def _read_parquet(path: Path) -> list[str]:
    return _extra("pyarrow.parquet").read_table(path, columns=["text"])["text"].to_pylist()


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # too long a name
        return False


def _same(name: str, other: str) -> bool:
    files = _is_file(Path(name)) and _is_file(Path(other))
    return name == other or (files and Path(name).samefile(other))


def _hub_documents(name: str, split: str) -> list[str]:
    """At most the first 20,000 rows of a data set, streamed; 200 lines are a document."""
    repository, config, joint = _HUB[name]
    datasets = _extra("datasets")
    if name == "c4":
        split = {"test": "validation"}.get(split, split)
    try:
        rows = datasets.load_dataset(repository, config, split=split, streaming=True).take(_HUB_ROWS)
        texts = [row["text"] for row in rows]
    except Exception as error:  # datasets raises what its file system and HTTP layers raise
        reason = " ".join(str(error).split())[:160]
        raise ResourceError(
            f"text {name} must come from the hub; that failed: {reason}; go online or give a file or pydocs"
        ) from error
    if joint is None:
        return texts
    return [joint.join(texts[start : start + _LINES]) for start in range(0, len(texts), _LINES)]


def _extra(module: str):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ResourceError(
            f"this text needs the package {module.split('.')[0]}; it is missing; pip install 'ppf[data]'"
        ) from error
