import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import tiny_models as tiny
from builders import refuses
from ppf.errors import InputError, ResourceError
from ppf.llm import pydocs
from ppf.llm.text import PARTS, TextSizes, load_text, sample_text, whole_text

END = 2
TOKENIZER = tiny.tokenizer(4000)
ALL = TextSizes(8, 10**6, 10**6, 0, 10**6)
SOME = TextSizes(8, 24, 40, 0, 32)


def words(start, stop):
    return " ".join(f"w{index}" for index in range(start, stop))


def tokens_of(text):
    return {part: set(getattr(text, part).ravel().tolist()) - {END} for part in PARTS}


def same(one, other):
    return all(np.array_equal(getattr(one, part), getattr(other, part)) for part in PARTS)


# --- corpora ---


def test_pydocs_parts_are_buckets_of_documents(monkeypatch):
    monkeypatch.setattr(pydocs, "documents", lambda bucket: [words(3 + 100 * bucket, 103 + 100 * bucket)])
    text = load_text("pydocs", TOKENIZER, ALL, 0)
    assert [getattr(text, part).ravel().tolist() for part in PARTS] == [list(range(start, start + 96)) for start in (3, 103, 203)]
    assert whole_text("pydocs", TOKENIZER).tolist() == [*range(203, 303), END]
    assert tokens_of(load_text("pydocs", TOKENIZER, ALL, 0))["test"] == set(text.test.ravel().tolist())


def hub(monkeypatch, splits):
    """A stand-in for the datasets package; returns what it was asked for."""
    asked = []

    def load_dataset(repository, config, split, streaming):
        asked.append((repository, split, streaming))
        rows = [{"text": text} for text in splits[split]]
        return SimpleNamespace(take=lambda count: rows[:count])

    package = ModuleType("datasets")
    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    return asked


@pytest.mark.parametrize(("name", "test_split"), [("wikitext2", "test"), ("c4", "validation")])
def test_hub_texts_keep_train_and_test_apart(monkeypatch, name, test_split):
    lines = [f"w{index}\n" for index in range(3, 3003)]
    asked = hub(monkeypatch, {"train": lines, test_split: [words(3003, 3403) + "\n"]})
    tokens = tokens_of(load_text(name, TOKENIZER, ALL, 0))
    assert [split for _, split, _ in asked] == ["train", test_split] and all(streaming for *_, streaming in asked)
    assert tokens["test"] == set(range(3003, 3403)) and not tokens["calibration"] & tokens["search"]
    assert tokens["calibration"] and len(tokens["calibration"] | tokens["search"]) > 2980
    assert whole_text(name, TOKENIZER).tolist() == [*range(3003, 3403), END]


@pytest.mark.parametrize(("name", "count"), [("wikitext2", 2), ("c4", 400)])
def test_rows_of_hub_texts_are_lines_or_documents(monkeypatch, name, count):
    ending = "\n" if name == "wikitext2" else ""
    hub(monkeypatch, {"test": [f"w3{ending}"] * 400, "validation": ["w3"] * 400})
    stream = whole_text(name, TOKENIZER)
    assert (stream == 3).sum() == 400 and (stream == END).sum() == count and set(stream.tolist()) == {3, END}


def test_a_separate_test_text_spares_the_hub_its_test_part(monkeypatch, tmp_path):
    asked = hub(monkeypatch, {"train": [words(start, start + 4) for start in range(3, 2403, 4)]})
    (tmp_path / "b.txt").write_text(words(3000, 3400))
    text = load_text("wikitext2", TOKENIZER, SOME, 0, test_name=str(tmp_path / "b.txt"))
    assert [split for _, split, _ in asked] == ["train"] and text.test.min() >= 3000


def test_what_the_hub_answers_is_translated(monkeypatch):
    hub(monkeypatch, {})
    with refuses(ResourceError):
        load_text("c4", TOKENIZER, SOME, 0)


def test_a_corpus_that_the_hub_has_only_as_a_script_is_none():
    with refuses(InputError):
        load_text("ptb", TOKENIZER, SOME, 0)


# --- text of the model itself ---


def test_self_is_seeded_and_its_parts_differ():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    texts = [load_text("self", tokenizer, SOME, seed, model=model) for seed in (4, 4, 5)]
    assert same(texts[0], texts[1]) and texts[0].digest != texts[2].digest
    streams = [sample_text(model, tokenizer, TextSizes(8, 32, 32, 0, 32), part, seed) for part in PARTS for seed in range(3)]
    assert len({stream.tobytes() for stream in streams}) == 9
    assert texts[0].test.shape == (4, 8) and (texts[0].test[:, 0] == 1).all()
    assert min(stream.min() for stream in streams) >= 0 and max(stream.max() for stream in streams) < tiny.VOCAB


def test_self_follows_the_model():
    sure = tiny.model("llama-mha")
    with torch.no_grad():
        sure.lm_head.weight *= 1e4
    blocks = sample_text(sure, tiny.tokenizer(), SOME, "search", 0).reshape(-1, 8)
    likeliest = tiny.logits(sure, blocks)[:, :-1].argmax(-1)
    assert (likeliest.numpy() == blocks[:, 1:]).all()


def test_self_draws_from_the_models_distribution():
    model, sizes = tiny.model("llama-mha"), TextSizes(2, 256, 256, 0, 256)
    drawn = np.concatenate([sample_text(model, tiny.tokenizer(), sizes, "test", seed).reshape(-1, 2)[:, 1] for seed in range(100)])
    expected = tiny.logits(model, np.array([[1]]))[0, -1].softmax(-1).numpy()
    found = np.bincount(drawn, minlength=tiny.VOCAB) / len(drawn)
    assert len(drawn) == 12_800 and np.abs(found - expected).max() < 5 * np.sqrt(expected.max() / len(drawn))


def test_self_leaves_the_model_alone():
    model = tiny.model()
    before = tiny.snapshot(model)
    load_text("self", tiny.tokenizer(), SOME, 0, model=model)
    assert tiny.snapshot(model) == before
    with refuses(InputError):
        load_text("self", tiny.tokenizer(), SOME, 0)
