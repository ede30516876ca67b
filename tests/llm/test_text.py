import json
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny_models as tiny
from builders import examples, refuses
from ppf.errors import DamagedError, InputError, ResourceError
from ppf.llm import pydocs
from ppf.llm.text import PARTS, Text, TextSizes, load_text, take_blocks, whole_text

WORDS = 4000
END = 2
TOKENIZER = tiny.tokenizer(WORDS)
ALL = TextSizes(8, 10**6, 10**6, 0, 10**6)
SOME = TextSizes(8, 24, 40, 0, 32)


def words(start, stop):
    return " ".join(f"w{index}" for index in range(start, stop))


def documents(count=120, length=30):
    """Documents in which every word occurs once."""
    return [words(3 + length * index, 3 + length * (index + 1)) for index in range(count)]


def write(path, texts):
    if path.suffix == ".txt":
        path.write_text(" ".join(texts), encoding="utf-8")
    elif path.suffix == ".jsonl":
        path.write_text(
            "".join(json.dumps({"text": text, "more": 1}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
        )
    else:
        arrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(arrow.table({"more": [1] * len(texts), "text": texts}), path)
    return str(path)


def loaded(name, sizes=SOME, seed=0, **options):
    return load_text(name, TOKENIZER, sizes, seed, **options)


def tokens_of(text):
    return {part: set(getattr(text, part).ravel().tolist()) - {END} for part in PARTS}


def same(one, other):
    return all(np.array_equal(getattr(one, part), getattr(other, part)) for part in PARTS)


each_format = pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])


# --- parts of files ---


@each_format
def test_parts_never_overlap_and_have_their_shares(tmp_path, suffix):
    tokens = tokens_of(loaded(write(tmp_path / f"a{suffix}", documents()), ALL))
    assert not tokens["calibration"] & tokens["search"] and not tokens["search"] & tokens["test"]
    assert not tokens["calibration"] & tokens["test"]
    for part, share in {"calibration": 0.2, "search": 0.4, "test": 0.4}.items():
        assert abs(len(tokens[part]) / 3600 - share) < (0.005 if suffix == ".txt" else 0.12), part


def test_a_short_plain_text_is_cut_in_order(tmp_path):
    text = loaded(write(tmp_path / "a.txt", [words(3, 300)]), ALL)
    assert text.calibration[0, 0] == 3 and text.test.max() >= 290
    assert text.calibration.max() < text.search.min() and text.search.max() < text.test[text.test != END].min()


def test_a_text_that_changes_on_its_way_is_the_same_in_all_parts(tmp_path):
    text = loaded(write(tmp_path / "a.txt", documents()), ALL)
    places = {part: np.sort(getattr(text, part).ravel()) for part in PARTS}
    for third in range(3):
        within = {part: ((place - 3) // 1200 == third).mean() for part, place in places.items()}
        assert max(within.values()) - min(within.values()) < 0.05, within
    assert all((np.diff(getattr(text, part), axis=1) == 1).all(1).mean() > 0.99 for part in PARTS)  # no block spans two pieces
    pieces = np.flatnonzero(np.diff(places["calibration"]) > 1).size + 1
    assert 20 <= pieces <= 22


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_equal_documents_fall_into_one_part(tmp_path, suffix):
    texts = [text for text in documents() for _ in range(3)]
    texts[::3] = [f" {text.replace(' ', '  ')}" for text in texts[::3]]
    tokens = tokens_of(loaded(write(tmp_path / f"a{suffix}", texts), ALL))
    assert sum(len(tokens[part]) for part in PARTS) == len(set.union(*tokens.values()))


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_documents_stay_in_their_part_whatever_else_is_in_the_file(tmp_path, suffix):
    few = tokens_of(loaded(write(tmp_path / f"a{suffix}", documents(60)), ALL))
    many = tokens_of(loaded(write(tmp_path / f"b{suffix}", documents(120)[::-1]), ALL))
    for part in PARTS:
        assert all(few[part] & many[other] <= {END} or other == part for other in PARTS)


def test_an_end_token_stands_behind_each_document(tmp_path):
    stream = whole_text(write(tmp_path / "a.jsonl", documents(5, 4)), TOKENIZER)
    assert stream.reshape(5, 5)[:, -1].tolist() == [END] * 5
    assert stream.reshape(5, 5)[:, :-1].ravel().tolist() == list(range(3, 23))
    without = tiny.tokenizer(WORDS)
    without.eos_token = None
    assert whole_text(str(tmp_path / "a.jsonl"), without).tolist() == list(range(3, 23))


def test_one_document_is_cut_as_a_plain_text(tmp_path):
    one = loaded(write(tmp_path / "a.jsonl", [" ".join(documents())]), ALL)
    assert same(one, loaded(write(tmp_path / "a.txt", documents()), ALL))


def test_separators_that_json_allows_in_strings_cut_no_line(tmp_path):
    texts = [f"{text}\u2028w3900\x85w3901\u2029w3902" for text in documents()]
    assert len(whole_text(write(tmp_path / "a.jsonl", texts), TOKENIZER)) == 120 * 34
    (tmp_path / "b.jsonl").write_bytes(b'\r\n\n{"text": "w3 w4"}\r\n \n{"text": "w5"}')
    assert whole_text(str(tmp_path / "b.jsonl"), TOKENIZER).tolist() == [3, 4, END, 5, END]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_empty_documents_are_left_out(tmp_path, suffix):
    name = write(tmp_path / f"a{suffix}", ["", "w3", "  \n", "w4"])
    assert whole_text(name, TOKENIZER).tolist() == [3, END, 4, END]


# --- a separate test text ---


@each_format
def test_a_separate_test_text_leaves_the_whole_first_one(tmp_path, suffix):
    first, second = write(tmp_path / f"a{suffix}", documents()), write(tmp_path / f"b{suffix}", [words(3700, 3900)])
    text = loaded(first, ALL, test_name=second)
    tokens = tokens_of(text)
    assert text.test.ravel().tolist() == [*range(3700, 3900)][: text.test.size]
    assert not tokens["calibration"] & tokens["search"] and not (tokens["calibration"] | tokens["search"]) & tokens["test"]
    assert len(tokens["calibration"] | tokens["search"]) > 3600 - 3 * ALL.seq_len
    assert abs(len(tokens["calibration"]) / 3600 - 1 / 3) < (0.005 if suffix == ".txt" else 0.12)


def test_the_same_text_twice_is_refused(tmp_path, monkeypatch):
    name = write(tmp_path / "a.txt", documents())
    (tmp_path / "link.txt").symlink_to(name)
    monkeypatch.chdir(tmp_path)
    for other in (name, "a.txt", str(tmp_path / "link.txt")):
        with refuses(InputError):
            loaded(name, test_name=other)
    with refuses(InputError):
        loaded("pydocs", test_name="pydocs")


def test_a_test_text_comes_from_outside_the_model(tmp_path):
    with refuses(InputError):
        loaded(write(tmp_path / "a.txt", documents()), test_name="self")


# --- blocks ---


@examples(200)
@given(st.integers(1, 400), st.integers(1, 20), st.none() | st.integers(1, 500), st.integers(0, 2**32))
def test_blocks_are_whole_distinct_in_order_and_spread(length, seq_len, tokens, seed):
    stream = np.arange(length) * 7
    if length < seq_len:
        with refuses(InputError):
            take_blocks(stream, seq_len, tokens, seed, "a (test)")
        return
    blocks = take_blocks(stream, seq_len, tokens, seed, "a")
    there = length // seq_len
    assert len(blocks) == (there if tokens is None else max(1, min(there, tokens // seq_len)))
    starts = blocks[:, 0] // 7
    assert (starts % seq_len == 0).all() and (np.diff(starts) > 0).all() and blocks.max() <= stream[-1]
    assert (blocks == (starts[:, None] + np.arange(seq_len)) * 7).all()
    gaps = np.diff(starts // seq_len)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    assert np.array_equal(blocks, take_blocks(stream, seq_len, tokens, seed, "a"))


def test_the_seed_chooses_the_blocks(tmp_path):
    name = write(tmp_path / "a.txt", documents())
    texts = [loaded(name, seed=seed) for seed in (0, 0, 1, 2)]
    assert same(texts[0], texts[1]) and texts[0].digest == texts[1].digest
    assert len({text.digest for text in texts}) == 3
    assert {text.calibration.shape for text in texts} == {(3, 8)}
    assert {text.search.shape for text in texts} == {(5, 8)} and {text.test.shape for text in texts} == {(4, 8)}


@pytest.mark.parametrize("part", PARTS)
def test_a_part_that_fills_no_block_is_named(tmp_path, monkeypatch, part):
    monkeypatch.setattr(pydocs, "documents", lambda bucket: ["w3 w4"] if PARTS[bucket] == part else [words(3, 50)])
    with refuses(InputError) as caught:
        loaded("pydocs")
    assert f"pydocs ({part})" in str(caught.value) and "--seq-len" in str(caught.value)


@pytest.mark.parametrize("content", ["", " \n\t ", "w3"])
def test_a_text_that_is_too_short_is_refused(tmp_path, content):
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(content if name == "a.txt" else json.dumps({"text": content}))
        with refuses(InputError):
            loaded(str(tmp_path / name))


# --- files that cannot be used ---


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"w3 \xff w4"),
        ("a.jsonl", b'{"text": "\xff"}\n'),
        ("a.jsonl", b'{"text": "w3"}\n{"text": "w4"\n'),
        ("a.jsonl", b'{"text": "w3"} {"text": "w4"}\n'),
        ("a.jsonl", b'{"word": "w3"}\n'),
        ("a.jsonl", b'["w3"]\n'),
        ("a.jsonl", b'"w3"\n'),
        ("a.jsonl", b"5\n"),
        ("a.jsonl", b'{"text": 5}\n'),
        ("a.jsonl", b'{"text": null}\n'),
        ("a.jsonl", b'{"text": "w3"}\n{"text": "\\ud800"}\n'),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}\n"),
        ("a.jsonl", b"[" * 100_000),
        ("a.jsonl", '\ufeff{"text": "w3"}\n'.encode()),
        ("a.csv", b"w3"),
        ("a.TXT", b"w3"),
        ("a", b"w3"),
    ],
)
def test_a_file_that_holds_no_documents_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with refuses(InputError):
        loaded(str(tmp_path / name))


@pytest.mark.parametrize("columns", [{"more": ["w3"]}, {"text": [1, 2]}, {"text": ["w3", None]}, {"text": [["w3"]]}])
def test_a_table_without_documents_is_refused(tmp_path, columns):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet")
    with refuses(InputError):
        loaded(str(tmp_path / "a.parquet"))
    data = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", b"PAR1", data[:-20], data[:40], b"w3 " * 100):
        (tmp_path / "a.parquet").write_bytes(damaged)
        with refuses(InputError):
            loaded(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("name", ["none.txt", "none", "pydoc", "folder.txt", "x" * 5000, "a\nb.txt", "a\0b.txt"])
def test_a_text_that_is_not_there_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pydocs, "documents", lambda _: [words(3, 50)])
    (tmp_path / "folder.txt").mkdir()
    for question in (loaded, lambda name: whole_text(name, TOKENIZER), lambda name: loaded("pydocs", test_name=name)):
        with refuses(InputError):
            question(name)


def test_a_file_that_cannot_be_read_is_said(tmp_path, monkeypatch):
    name = write(tmp_path / "a.txt", documents())

    def fails(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.read_text", fails)
    with refuses(ResourceError):
        loaded(name)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("wikitext2", "datasets")])
def test_a_missing_package_is_named(tmp_path, monkeypatch, name, package):
    (tmp_path / "a.parquet").touch()
    monkeypatch.chdir(tmp_path)
    for module in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    with refuses(ResourceError) as caught:
        loaded(name)
    assert str(caught.value).count(package) == 1 and "pip install" in str(caught.value)


# --- the artefact ---


@pytest.mark.parametrize("sizes", [SOME, TextSizes(8, 24, 40, 80, 32)])
def test_a_text_comes_back(tmp_path, sizes):
    text = loaded(write(tmp_path / "a.txt", documents()), sizes)
    text.save(tmp_path / "text", "f")
    again = Text.load(tmp_path / "text", "f")
    assert same(text, again) and (again.name, again.digest) == (text.name, text.digest)
    np.testing.assert_array_equal(again.validation, text.validation)
    assert again.search.dtype == again.validation.dtype == np.int64
    assert again.validation.shape == (sizes.validation // 8, 8)
    with refuses(DamagedError):
        Text.load(tmp_path / "text", "g")
    with refuses(DamagedError):
        Text.load(tmp_path / "none", "f")


def test_the_digest_sees_tokens_parts_and_arrangement():
    ids = np.arange(24).reshape(3, 8)
    texts = [
        Text("a", ids, ids, ids, ids),
        Text("a", ids, ids, ids, ids + 1),
        Text("a", ids + 1, ids, ids, ids),
        Text("a", ids.reshape(6, 4), ids, ids, ids),
        Text("a", ids, ids, ids + 1, ids),
        Text("a", ids, ids, ids[:0], ids),
        Text("a", ids, ids[:2], ids[:1], ids),
        Text("a", ids, ids[:1], ids[:2], ids),
    ]
    assert len({text.digest for text in texts}) == 8
    assert Text("b", ids.astype(np.int32), ids, ids, ids).digest == texts[0].digest
