"""Tokenizers of every kind that llama.cpp knows, small enough to train in milliseconds, and models that fit them."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import tiny_models
from builders import random_mask
from ppf.llm.architectures import layout_of_model
from ppf.llm.experts import separate_experts
from ppf.llm.gguf_tokenizer import PRE_TOKENIZERS
from ppf.llm.surgery import cut

VOCAB = 420
REFUSED = {
    "opt-mha": "opt came", "opt-projected-norms-behind": "opt came", "qwen2_moe-shared": "layer 1 has none",
    "qwen3_moe-sparse-tied": "layer 0 has none", "qwen3-biases": "biases", "smollm3-gqa-window": "rotary",
}  # fmt: skip
"""The tiny models that llama.cpp has no architecture for, and a word of why."""
HELD = [name for name in tiny_models.TINY if name not in REFUSED]
"""The tiny models that it has one for."""
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TEXT = Path(__file__).read_text(encoding="utf-8") + "Größe, naïve café; 日本語 и кириллица 🙂 12345 " * 3
SPACE = "\u2581"


def byte_level(name: str) -> PreTrainedTokenizerBase:
    """Byte-level BPE with the pre-tokenizer that llama.cpp calls by this name."""
    steps, ignore_merges = next(key for key, value in PRE_TOKENIZERS.items() if value == name)
    made = [_step(*step) for step in steps]
    backend = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    backend.pre_tokenizer = made[0] if len(made) == 1 else pre_tokenizers.Sequence(made)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|bos|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10, special_tokens=special, initial_alphabet=sorted(alphabet), show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>")
    tokenizer.add_tokens(["<tool>"])
    tokenizer.chat_template = CHAT
    return tokenizer


def _step(kind: str, *options):
    if kind == "Split":
        return pre_tokenizers.Split(Regex(options[0]), behavior=options[1].lower(), invert=options[2])
    if kind == "Digits":
        return pre_tokenizers.Digits(individual_digits=options[0])
    return pre_tokenizers.ByteLevel(add_prefix_space=options[0], use_regex=options[1])


def sentence_piece(metaspace: bool = False, bos: bool = True, missing_bytes: int = 0) -> PreTrainedTokenizerBase:
    """BPE with byte tokens as Llama 2 has it; spaces are marked by the normalizer or by the pre-tokenizer."""
    plain = Tokenizer(models.BPE(unk_token="<unk>"))
    _mark(plain, metaspace)
    words = [word for line in TEXT.splitlines() for word in line.replace(" ", f" {SPACE}").split(" ")]
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.normalizer = None
    plain.train_from_iterator(words, trainers.BpeTrainer(vocab_size=120, limit_alphabet=60, show_progress=False))
    model = json.loads(plain.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256 - missing_bytes))]
    vocab = {piece: at for at, piece in enumerate([*first, *pieces])}
    backend = Tokenizer(
        models.BPE(vocab, [tuple(pair) for pair in model["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    _mark(backend, metaspace)
    if bos:
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def unigram() -> PreTrainedTokenizerBase:
    """A SentencePiece unigram model."""
    backend = Tokenizer(models.Unigram())
    _mark(backend, metaspace=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _mark(backend: Tokenizer, metaspace: bool) -> None:
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])


def model(name: str = "llama-gqa-tied", vocab: int = VOCAB, **fields) -> PreTrainedModel:
    """A model of ``tiny_models`` with another vocabulary or other fields; every parameter is random."""
    config = tiny_models.TINY[name]()
    config.update({"vocab_size": vocab, **fields})
    made = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            base = parameter if parameter.dim() == 1 else 0
            parameter.copy_(base + 0.15 * torch.randn(parameter.shape, generator=generator))
    return separate_experts(made.eval())


def pruned(dense: PreTrainedModel, seed: int = 3, fill=None) -> PreTrainedModel:
    """A cut of it in which layers differ."""
    layout = layout_of_model(dense)
    return cut(dense, layout, random_mask(layout, seed), fill)
