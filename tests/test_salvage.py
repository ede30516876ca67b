import json
import math
import random
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from builders import layout, random_mask, refuses
from ppf import salvage as module
from ppf.errors import ResourceError
from ppf.salvage import salvage
from ppf.samples import Measurement, Sample, SampleStore

LAYOUT = layout(layers=1, ffn=200)


def some(count, of=LAYOUT, context="c", **result):
    """Samples of different masks, one in nine of which failed."""
    measured = [Measurement(2.5 + seed, math.nan if seed % 9 == 8 else seed % 4, 4096 * seed, seed / 2) for seed in range(count)]
    return [Sample.of(random_mask(of, seed), context, "spread", 0.3, seed % 3, one) for seed, one in enumerate(measured)]


def stored(path, samples, close=True):
    store = SampleStore(path, "c", write=True)
    for one in samples:
        store.add(one)
    if close:
        store.close()
    return store


def readable(path):
    """What SQLite reads of a damaged store before it stops, from either end."""
    found = set()
    for order in ("", "DESC"):
        try:
            with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as db:
                db.text_factory = lambda raw: raw.decode(errors="surrogateescape")
                columns = "context, digest, purpose, ratio, kept, mask, status, reason, log_ppl, kl, tokens, seconds, round, crc"
                for row in db.execute(f"SELECT {columns} FROM samples NOT INDEXED ORDER BY rowid {order}"):
                    found.add(module.whole_row(row))
        except (sqlite3.DatabaseError, UnicodeDecodeError):
            pass
    return found - {None}


def test_a_whole_store_gives_all_its_samples_in_their_order(tmp_path):
    samples = some(120) + some(5, context="other")
    stored(tmp_path / "s", samples)
    assert salvage([tmp_path / "s"]) == samples


@pytest.mark.parametrize("ffn", [40_000, 400_000])
def test_rows_that_fill_several_pages_are_whole(tmp_path, ffn):
    wide = layout(layers=1, ffn=ffn)
    samples = some(5, wide)
    stored(tmp_path / "s", samples)
    assert len(samples[0].mask) > 4096 and salvage([tmp_path / "s"]) == samples


def test_what_only_the_log_holds_is_found(tmp_path):
    samples, store = some(40), stored(tmp_path / "s", some(40), close=False)
    assert salvage([tmp_path / "s", tmp_path / "s-wal"]) == salvage([tmp_path / "s-wal"]) == samples
    store.close()


def test_a_finished_sample_comes_before_a_failed_one(tmp_path):
    failed = some(9)[8]
    done = Sample.of(random_mask(LAYOUT, 8), "c", "spread", 0.3, 0, Measurement(2.5, 0.5, 9, 1.0))
    for name, order in (("a", [failed, done]), ("b", [done])):
        stored(tmp_path / name, order)
    assert salvage([tmp_path / "a"]) == salvage([tmp_path / "b", tmp_path / "a"]) == [done]


def damages(data, rng):
    """(Name, damaged bytes): flips, cuts, zeroed pages, another beginning, nothing at all."""
    for _ in range(1000):
        place = rng.randrange(len(data))
        yield "flip", data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]
    for _ in range(200):
        yield "cut", data[: rng.randrange(len(data))]
    for page in [*range(0, len(data), 4096), *(4096 * rng.randrange(len(data) // 4096) for _ in range(50))]:
        yield "zeroed", data[:page] + bytes(4096) + data[page + 4096 :]
    yield from (
        ("magic", b"not SQLite at all" + data[17:]),
        ("no header", bytes(100) + data[100:]),
        ("empty", b""),
        ("short", b"x"),
    )


def test_of_a_damaged_store_all_that_sqlite_reads_is_kept_and_nothing_is_altered(tmp_path):
    samples, rng = some(70), random.Random(0)
    data = stored(tmp_path / "s", samples) and (tmp_path / "s").read_bytes()
    lost = {}
    for kind, damaged in damages(data, rng):
        (tmp_path / "d").write_bytes(damaged)
        found = set(salvage([tmp_path / "d"]))
        assert found <= set(samples), kind
        assert found >= readable(tmp_path / "d"), kind
        lost.setdefault(kind, []).append(len(samples) - len(found))
    assert np.mean(lost["flip"]) < 1  # one row at most, but for a flip in the head of a page
    pages = len(data) // 4096
    assert pages >= 5 and sum(lost["zeroed"][:pages]) == len(samples)  # of each zeroed page its own rows
    assert lost["magic"] == lost["no header"] == [0] and lost["empty"] == lost["short"] == [len(samples)]


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 100, 4096, 9000])
def test_any_bytes_are_read(tmp_path, size):
    rng = np.random.default_rng(size)
    for start in (b"", (0x377F0682).to_bytes(4, "big"), b"SQLite format 3\0\xff\xff"):
        for head in (b"", b"\x0d" + rng.bytes(7)):
            (tmp_path / "s").write_bytes((start + head + rng.bytes(size))[: max(size, len(start))])
            assert salvage([tmp_path / "s"]) == []


def test_a_file_that_cannot_be_read_is_said(tmp_path):
    with refuses(ResourceError):
        salvage([tmp_path])


def test_the_columns_of_reals_are_those_of_the_table(tmp_path):
    stored(tmp_path / "s", some(1))
    with closing(sqlite3.connect(tmp_path / "s")) as db:
        table = db.execute("PRAGMA table_info(samples)").fetchall()
    assert {number for number, _, kind, *_ in table if kind == "REAL"} == module.REALS
    assert json.dumps([name for _, name, *_ in table][:3]) == '["context", "digest", "purpose"]'
