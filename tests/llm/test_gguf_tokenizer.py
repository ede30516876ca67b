import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import gguf_builders as builders
import tiny_models
from ppf.llm.gguf_tokenizer import PRE_TOKENIZERS, vocabulary
from ppf.llm.load import EMBEDDED, load_tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def key(found, name):
    return found.keys[f"tokenizer.ggml.{name}"]


@pytest.mark.parametrize("name", sorted(set(PRE_TOKENIZERS.values())))
def test_byte_level_bpe_is_written_with_the_name_of_its_pre_tokenizer(name):
    tokenizer = builders.byte_level(name)
    found = vocabulary(tokenizer, builders.VOCAB)
    assert (key(found, "model"), key(found, "pre"), found.missing) == ("gpt2", name, "")
    texts, types = key(found, "tokens"), key(found, "token_type")
    assert len(texts) == len(types) == builders.VOCAB and len(set(texts)) == builders.VOCAB
    for text, at in tokenizer.get_vocab().items():
        assert texts[at] == text
    assert types[0] == types[1] == CONTROL and types[texts.index("<tool>")] == USER_DEFINED
    assert types[-1] == UNUSED and types[5] == NORMAL
    for merge in key(found, "merges"):
        left, right = merge.split(" ")
        assert {left, right, left + right} <= set(texts)


def test_the_embedded_model_has_a_gpt_2_tokenizer():
    found = vocabulary(load_tokenizer(EMBEDDED["ref-a"], 4096), 4096)
    assert (key(found, "pre"), key(found, "add_bos_token"), key(found, "eos_token_id")) == ("gpt-2", False, 0)


def test_the_chat_template_goes_along():
    found = vocabulary(builders.byte_level("qwen2"), builders.VOCAB)
    assert found.keys["tokenizer.chat_template"] == builders.CHAT and "chat template" in found.label
    assert "tokenizer.chat_template" not in vocabulary(builders.sentence_piece(), builders.VOCAB).keys


@pytest.mark.parametrize("metaspace", [False, True])
@pytest.mark.parametrize("bos", [False, True])
def test_sentence_piece_bpe_is_written_with_scores_that_keep_its_order(metaspace, bos):
    tokenizer = builders.sentence_piece(metaspace, bos)
    found = vocabulary(tokenizer, builders.VOCAB)
    assert (key(found, "model"), key(found, "add_space_prefix"), key(found, "add_bos_token")) == ("llama", True, bos)
    types, scores, texts = (key(found, name) for name in ("token_type", "scores", "tokens"))
    assert types[:4] == [UNKNOWN, CONTROL, CONTROL, BYTE] and types.count(BYTE) == 256
    assert all(isinstance(score, float) for score in scores)
    merged = [text for text in texts[259:] if len(text) > 1 and not text.startswith("[PAD")]
    ranks = [scores[texts.index(text)] for text in merged]
    assert len(merged) > 20 and ranks == sorted(ranks, reverse=True) and len(set(ranks)) == len(ranks)
    single = [scores[at] for at, text in enumerate(texts) if len(text) == 1]
    assert max(single) < min(ranks)


def test_a_unigram_model_keeps_its_scores():
    tokenizer = builders.unigram()
    found = vocabulary(tokenizer, builders.VOCAB)
    assert key(found, "model") == "t5" and key(found, "token_type")[0] == UNKNOWN
    scores = key(found, "scores")
    assert len(scores) == builders.VOCAB and min(scores[3:150]) < 0 and set(scores[len(tokenizer) :]) == {0.0}


def foreign(pre=None, **options):
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, [], **options))
    backend.pre_tokenizer = pre
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize(
    "tokenizer",
    [
        tiny_models.tokenizer(),
        foreign(pre_tokenizers.Whitespace()),
        foreign(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        foreign(pre_tokenizers.Split(Regex(r"\d+"), behavior="isolated")),
        foreign(pre_tokenizers.ByteLevel(add_prefix_space=False)),
        foreign(pre_tokenizers.ByteLevel(add_prefix_space=False), ignore_merges=True),
        foreign(pre_tokenizers.ByteLevel(add_prefix_space=False), end_of_word_suffix="</w>"),
        builders.sentence_piece(missing_bytes=1),
        foreign(pre_tokenizers.Whitespace(), byte_fallback=True),
        object(),
    ],
)
def test_what_llama_cpp_does_not_know_is_left_out_with_the_reason(tokenizer):
    found = vocabulary(tokenizer, builders.VOCAB)
    assert found.keys == {"tokenizer.ggml.model": "no_vocab"} and found.label == "none" and len(found.missing) > 10
    assert len(found.notes) == 1 and found.missing in found.notes[0]


def test_byte_level_bpe_without_merges_is_said_to_have_none():
    tokenizer = foreign(pre_tokenizers.ByteLevel(add_prefix_space=False))
    assert "merges" in vocabulary(tokenizer, builders.VOCAB).missing and vocabulary(builders.byte_level("gpt-2"), 420).notes == ()


def test_a_tokenizer_that_is_written_splits_ends_as_it_does():
    for tokenizer in (builders.sentence_piece(bos=True), builders.byte_level("gpt-2")):
        found = vocabulary(tokenizer, builders.VOCAB)
        ids = tokenizer("abc")["input_ids"]
        assert key(found, "add_bos_token") == (ids[0] == tokenizer.bos_token_id) and not key(found, "add_eos_token")
        assert key(found, "bos_token_id") == tokenizer.bos_token_id and key(found, "eos_token_id") == tokenizer.eos_token_id
