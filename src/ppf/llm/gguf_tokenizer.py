"""A tokenizer in the keys of a GGUF file. llama.cpp splits text by code of its own, so only what it knows by name is written.

gpt2    byte-level BPE; how text is cut before merging (the pre-tokenizer) must be one of ``PRE_TOKENIZERS``
llama   BPE over words marked with U+2581, with byte tokens, as SentencePiece makes it
t5      a SentencePiece unigram model
none    anything else: the file then takes token ids only, and the user is told
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _CONTRACTIONS + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTES_ONLY, _BYTES_AND_WORDS = ("ByteLevel", False, False), ("ByteLevel", False, True)

PRE_TOKENIZERS: dict[tuple[tuple[Any, ...], bool], str] = {
    ((_BYTES_AND_WORDS,), False): "gpt-2",
    ((("Digits", True), _BYTES_AND_WORDS), False): "smollm",
    ((("Split", _LLAMA3, "Isolated", False), _BYTES_ONLY), True): "llama-bpe",
    ((("Split", _LLAMA3, "Isolated", False), _BYTES_ONLY), False): "smaug-bpe",
    ((("Split", _QWEN2, "Isolated", False), _BYTES_ONLY), False): "qwen2",
    ((("Split", _TEKKEN, "Isolated", False), _BYTES_ONLY), True): "tekken",
}
"""llama.cpp's name by the steps of the pre-tokenizer, and by whether whole words that are tokens are taken without merging."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    Attributes:
        keys: Values by key.
        label: For people, such as ``"gpt2 with pre-tokenizer qwen2"``.
        missing: Why there is none; empty where there is one.
    """

    keys: dict[str, Any]
    label: str
    missing: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return (f"the file holds no tokenizer and takes token ids only: {self.missing}",) if self.missing else ()


class _UnknownError(Exception):
    """llama.cpp has no name for a part of the tokenizer."""


def vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """The tokenizer's keys, with its special tokens and chat template; or none, with the reason.

    A Unicode normal form (NFC) before byte-level BPE is left out: llama.cpp takes the text as it is written.

    Args:
        tokenizer: Of the model.
        size: Embeddings of the model; ids that the tokenizer does not use become unused tokens.
    """
    try:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise _UnknownError("it has no tokenizer.json")
        record = json.loads(backend.to_str())
        kind, keys = _kind(record)
        texts, types = _tokens(record, kind, size)
    except _UnknownError as reason:
        return Vocabulary({"tokenizer.ggml.model": "no_vocab"}, "none", str(reason))
    keys = {"tokenizer.ggml.model": kind, **keys, "tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": types}
    if kind != "gpt2":
        keys["tokenizer.ggml.scores"] = _scores(record, texts)
    label = f"{kind} with pre-tokenizer {keys['tokenizer.ggml.pre']}" if kind == "gpt2" else kind
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        keys["tokenizer.chat_template"] = template
    return Vocabulary({**keys, **_special(tokenizer)}, label + (", chat template" if isinstance(template, str) else ""))


def _kind(record: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """llama.cpp's name of the algorithm, and the keys that go with it."""
    model, normalizer = record["model"], record["normalizer"]
    steps = _steps(record["pre_tokenizer"])
    if model["type"] == "Unigram":
        prefix = _space_prefix(normalizer, steps)
        keys: dict[str, Any] = {"add_space_prefix": prefix, "remove_extra_whitespaces": False}
        return "t5", {"tokenizer.ggml.pre": "default", **{f"tokenizer.ggml.{key}": value for key, value in keys.items()}}
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout"):
        raise _UnknownError(f"llama.cpp does not know its model, {model['type']} with such options")
    if model.get("byte_fallback"):
        return "llama", {"tokenizer.ggml.pre": "default", "tokenizer.ggml.add_space_prefix": _space_prefix(normalizer, steps)}
    name = PRE_TOKENIZERS.get((steps, bool(model.get("ignore_merges"))))
    if name is None or (normalizer is not None and normalizer["type"] != "NFC"):
        raise _UnknownError(f"llama.cpp's name for its pre-tokenizer {json.dumps(record['pre_tokenizer'])[:120]} is not known")
    if not model["merges"]:
        raise _UnknownError("llama.cpp takes byte-level BPE with merges only, and it has none")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    return "gpt2", {"tokenizer.ggml.pre": name, "tokenizer.ggml.merges": merges}


def _steps(pre: dict[str, Any] | None) -> tuple[Any, ...]:
    """A pre-tokenizer as plain values to compare."""
    if pre is None:
        return ()
    if pre["type"] == "Sequence":
        return tuple(step for part in pre["pretokenizers"] for step in _steps(part))
    if pre["type"] == "Split":
        return (("Split", next(iter(pre["pattern"].values())), pre["behavior"], pre["invert"]),)
    fields = {
        "ByteLevel": ("add_prefix_space", "use_regex"),
        "Digits": ("individual_digits",),
        "Metaspace": ("replacement", "prepend_scheme", "split"),
    }
    return ((pre["type"], *(pre.get(field) for field in fields.get(pre["type"], ()))),)


def _space_prefix(normalizer: dict[str, Any] | None, steps: tuple[Any, ...]) -> bool:
    """Whether a space is put before the text; words must be marked in one of the two ways that SentencePiece's are."""
    parts = [] if normalizer is None else normalizer.get("normalizers", [normalizer])
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    if not steps and parts in ([prepend, replace], [replace]):
        return len(parts) == 2
    if not parts and len(steps) == 1 and steps[0][:2] == ("Metaspace", _SPACE):
        return steps[0][2] in ("always", "first")
    raise _UnknownError("llama.cpp does not know how it marks spaces")


def _tokens(record: dict[str, Any], kind: str, size: int) -> tuple[list[str], list[int]]:
    """Text and type of every id."""
    model = record["model"]
    found = (
        model["vocab"].items() if isinstance(model["vocab"], dict) else ((text, at) for at, (text, _) in enumerate(model["vocab"]))
    )
    texts, types = [f"[PAD{at}]" for at in range(size)], [_UNUSED] * size
    for text, at in found:
        byte = kind != "gpt2" and _BYTE_TOKEN.fullmatch(text)
        texts[at], types[at] = text, _BYTE if byte else _NORMAL
    for token in record["added_tokens"]:
        at, text = token["id"], token["content"]
        plain = text.replace(_SPACE, " ") if kind == "llama" and not token["special"] else text
        texts[at], types[at] = plain, _CONTROL if token["special"] else _USER_DEFINED
    unknown = model.get("unk_token") if kind == "llama" else model.get("unk_id") if kind == "t5" else None
    at = texts.index(unknown) if isinstance(unknown, str) and unknown in texts else unknown
    if isinstance(at, int):
        types[at] = _UNKNOWN
    if kind == "llama" and types.count(_BYTE) != 256:
        raise _UnknownError(f"llama.cpp needs 256 byte tokens beside it, {types.count(_BYTE)} are there")
    return texts, types


def _scores(record: dict[str, Any], texts: list[str]) -> list[float]:
    """Which piece to build first: a unigram model's own log-probabilities; in BPE the earliest merge that makes it."""
    model = record["model"]
    if isinstance(model["vocab"], list):
        own = [float(score) for _, score in model["vocab"]]
        return own + [0.0] * (len(texts) - len(own))
    rank: dict[str, int] = {}
    for at, pair in enumerate(model["merges"]):
        rank.setdefault("".join(pair.split(" ") if isinstance(pair, str) else pair), at)
    return [-float(rank.get(text, len(rank)) + 1) for text in texts]


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Ids of special tokens, and whether a text gets them at its ends: seen from what the tokenizer does."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
    keys: dict[str, Any] = {f"tokenizer.ggml.{names[name]}_token_id": int(at) for name, at in ids.items() if at is not None}
    bare, dressed = (list(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
    longer = len(dressed) > len(bare)
    keys["tokenizer.ggml.add_bos_token"] = longer and dressed[0] == ids["bos"]
    keys["tokenizer.ggml.add_eos_token"] = longer and dressed[-1] == ids["eos"]
    return keys
