import itertools

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import tiny_models as tiny
from builders import importance
from ppf.llm.architectures import layout_of_model
from ppf.llm.elastic import ElasticModel
from ppf.llm.generate import Sampling, generate
from ppf.llm.surgery import cut
from ppf.space.allocation import Allocation
from ppf.space.mask import select

PROMPT = [5, 9, 40, 7, 33, 18, 61]
TOKENIZER = tiny.tokenizer()


@pytest.fixture(scope="module")
def elastic():
    model = tiny.model("llama-mha")
    model.generation_config.eos_token_id = 2
    return ElasticModel(model, layout_of_model(model), importance(layout_of_model(model)))


def at(elastic, share):
    layout = elastic.layout
    return elastic.view(Allocation(np.maximum(layout.floors, (layout.units * share).astype(int))))


def run(elastic, sampling, *views, prompt=PROMPT):
    """All pieces; the views come one a token, the last again and again."""
    order = itertools.chain(views, itertools.repeat(views[-1]))
    return list(generate(elastic, TOKENIZER, prompt, sampling, lambda: next(order)))


def text(pieces):
    return "".join(piece.text for piece in pieces)


def greedy(count, **options):
    return Sampling(count, temperature=0, **options)


@pytest.mark.parametrize("share", [1, 0.6, 0])
def test_greedy_text_is_that_of_the_cut_model(elastic, share):
    view, dense = at(elastic, share), tiny.model("llama-mha")
    mask = select(view.allocation, importance(elastic.layout), elastic.layout)
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, pad_token_id=2, eos_token_id=2)
    expected = cut(dense, elastic.layout, mask).generate(torch.tensor([PROMPT]), generation_config=settings)[0, len(PROMPT) :]
    pieces = run(elastic, greedy(12), view)
    assert text(pieces).split() == TOKENIZER.decode(expected, skip_special_tokens=True).split()
    assert [piece.tokens for piece in pieces] == list(range(1, len(pieces) + 1))
    assert [piece.carried for piece in pieces] == [None] + ["kept"] * (len(pieces) - 1)
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1) and pieces[-1].finish in ("stop", "length")


def test_a_ratio_that_rises_narrows_the_cache_and_one_that_falls_rebuilds_it(elastic):
    whole, half = at(elastic, 1), at(elastic, 0.5)
    pieces = run(elastic, greedy(6), whole, whole, half, half, whole)
    assert [piece.carried for piece in pieces] == [None, "kept", "narrowed", "kept", "rebuild", "kept"]
    assert [piece.view for piece in pieces] == [whole, whole, half, half, whole, whole]


def test_after_a_rebuild_the_text_goes_on_as_if_it_had_been_that_size_all_along(elastic):
    whole, half = at(elastic, 1), at(elastic, 0.5)
    begun = text(run(elastic, greedy(2), half)).split()
    switched = text(run(elastic, greedy(6), half, half, whole)).split()
    prompt = [*PROMPT, *TOKENIZER.encode(" ".join(begun))]
    assert switched == begun + text(run(elastic, greedy(4), whole, prompt=prompt)).split()


# --- sampling ---


def test_a_seed_gives_one_text(elastic):
    view = at(elastic, 1)
    texts = {text(run(elastic, Sampling(10, seed=seed), view)) for seed in (1, 1, 2, 3)}
    assert len(texts) == 3
    assert len({text(run(elastic, Sampling(10), view)) for _ in range(3)}) > 1


def test_a_tiny_nucleus_is_greedy(elastic):
    view = at(elastic, 1)
    assert text(run(elastic, Sampling(8, top_p=1e-9, seed=0), view)) == text(run(elastic, greedy(8), view))


def test_frequencies_are_those_of_the_model(elastic):
    view = at(elastic, 1)
    with torch.inference_mode(), elastic.at(view) as model:
        expected = torch.softmax(model(input_ids=torch.tensor([PROMPT])).logits[0, -1] / 0.5, 0)
    counts = np.zeros(tiny.VOCAB)
    for seed in range(400):
        words = text(run(elastic, Sampling(1, temperature=0.5, seed=seed), view)).split()
        counts[TOKENIZER.encode(words[0])[0] if words else 2] += 1
    likely = int(expected.argmax())
    share, p = counts[likely] / 400, float(expected[likely])
    assert abs(share - p) < 4 * (p * (1 - p) / 400) ** 0.5


def test_the_smallest_temperature_takes_the_likeliest(elastic):
    view = at(elastic, 1)
    assert text(run(elastic, Sampling(6, temperature=1e-40, seed=1), view)) == text(run(elastic, Sampling(6, temperature=0), view))


# --- where it ends ---


def test_it_ends_at_the_end_of_the_text(elastic):
    words = text(run(elastic, greedy(6), at(elastic, 1))).split()
    with elastic.at() as model:
        model.generation_config.eos_token_id = [2, TOKENIZER.encode(words[3])[0]]
    try:
        pieces = run(elastic, greedy(6), at(elastic, 1))
    finally:
        model.generation_config.eos_token_id = 2
    assert text(pieces).split() == words[: words.index(words[3])] and pieces[-1].finish == "stop"


@pytest.mark.parametrize("cut_at", [1, 3, 5])
def test_a_stop_string_ends_it_and_is_not_told(elastic, cut_at):
    whole = text(run(elastic, greedy(8), at(elastic, 1)))
    words = whole.split()
    stop = f"{words[cut_at]} {words[cut_at + 1]}"[1:]  # begins inside a word, goes across two tokens
    pieces = run(elastic, greedy(8, stop=("never", stop)), at(elastic, 1))
    assert text(pieces) == whole[: whole.index(stop)] and pieces[-1].finish == "stop"
    assert len(pieces) == len(whole[: whole.index(stop) + len(stop)].split())


def test_what_might_have_been_a_stop_string_is_told_in_the_end(elastic):
    whole = text(run(elastic, greedy(5), at(elastic, 1)))
    pieces = run(elastic, greedy(5, stop=(whole[-2:] + "x",)), at(elastic, 1))
    assert text(pieces) == whole and pieces[-1].finish == "length"


class _Bytes:
    """A tokenizer of one byte a token."""

    eos_token_id = None

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", "replace")


def spell(elastic, monkeypatch, word, count):
    """The pieces of a model that says one word."""
    script = iter(word.encode())
    monkeypatch.setattr("ppf.llm.generate._last_logits", lambda *_: torch.zeros(1))
    monkeypatch.setattr("ppf.llm.generate._Draw.__call__", lambda *_: next(script))
    return [piece.text for piece in generate(elastic, _Bytes(), [97], greedy(count), lambda: elastic.current)]


def test_characters_of_several_tokens_come_whole(elastic, monkeypatch):
    found = spell(elastic, monkeypatch, "aé漢🙂b", 11)
    assert "".join(found) == "aé漢🙂b" and found.count("") == 6


def test_half_a_character_at_the_end_is_told_as_such(elastic, monkeypatch):
    assert spell(elastic, monkeypatch, "é", 1) == ["\ufffd"]
