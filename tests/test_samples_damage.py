import os
import shutil
import sqlite3

import numpy as np
import pytest

from builders import refuses
from ppf import samples as samples_module
from ppf.errors import DamagedError, ResourceError
from ppf.samples import SampleStore, roll_back
from stores_made import change, cut_off, opened, sample, stored

CHANGES = {
    "purpose": "probe", "ratio": 0.31, "kept": "[2, 19]", "mask": bytes(3), "status": "failed", "reason": "x", "log_ppl": 2.5000001,
    "kl": None, "tokens": 4097, "seconds": 1.25, "round": 1, "crc": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "value"), [*CHANGES.items(), ("kept", "5"), ("kept", "[2,"), ("mask", "text"), ("log_ppl", "text"), ("tokens", 1.5)]
)
def test_an_altered_row_counts_as_not_measured(tmp_path, column, value):
    path = stored(tmp_path, sample(1), sample(2), sample(3))
    change(path, f"UPDATE samples SET {column} = ? WHERE digest = ?", value, sample(2).digest)
    with opened(path, write=True) as store:
        assert store.all() == [sample(1), sample(3)] and store.damaged == 1
        assert store.failed() == [] and store.get(sample(2).digest) is None
        store.add(sample(2))
        assert store.all() == [sample(1), sample(3), sample(2)] and store.damaged == 0


def test_an_altered_mask_name_counts_as_not_measured(tmp_path):
    path = stored(tmp_path, sample(1), sample(2))
    change(path, "UPDATE samples SET digest = ? WHERE digest = ?", sample(3).digest, sample(2).digest)
    with opened(path) as store:
        assert store.all() == [sample(1)] and store.damaged == 1 and store.get(sample(3).digest) is None


@pytest.mark.parametrize("column", ["purpose", "kept", "status", "reason"])
def test_a_row_that_is_no_text_any_more_spoils_no_other(tmp_path, column):
    path = stored(tmp_path, sample(1), sample(2))
    change(path, f"UPDATE samples SET {column} = CAST(x'ff5b' AS TEXT) WHERE digest = ?", sample(2).digest)
    with opened(path) as store:
        assert store.all() == [sample(1)] and store.damaged == 1


def outcome(folder, data, samples, write=False):
    """What a store with these bytes gives: "whole" (or its losses counted), "lost", "altered", or the name of an error."""
    folder.mkdir()
    (folder / "s").write_bytes(data)
    try:
        with opened(folder / "s", write=write) as store:
            found = store.all()
            if not set(found) <= set(samples):
                return "altered"
            return "whole" if len(found) + store.damaged == len(samples) else "lost"
    except Exception as error:
        return type(error).__name__ + (" of several lines" if "\n" in str(error) else "")
    finally:
        shutil.rmtree(folder)


def test_a_flipped_bit_anywhere_never_alters_a_sample(tmp_path):
    samples, rng = [sample(seed) for seed in range(30)], np.random.default_rng(0)
    data = stored(tmp_path, *samples).read_bytes()
    outcomes = {}
    for place in [*range(100), *range(3600, 4096, 4), *rng.integers(0, len(data), 300).tolist()]:
        flipped = data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :]
        outcomes.setdefault(outcome(tmp_path / "flipped", flipped, samples), []).append(place)
    assert set(outcomes) <= {"whole", "lost", "DamagedError", "NewerError"}, outcomes
    assert len(outcomes.get("NewerError", ())) <= 31  # the bits of the version's own number


def test_a_zeroed_page_never_alters_a_sample(tmp_path):
    samples = [sample(seed) for seed in range(120)]
    data = stored(tmp_path, *samples).read_bytes()
    pages = range(0, len(data), 4096)
    outcomes = {
        outcome(tmp_path / "zeroed", data[:page] + bytes(4096) + data[page + 4096 :], samples, write)
        for page in pages
        for write in (False, True)
    }
    assert len(pages) > 8 and outcomes <= {"whole", "lost", "DamagedError"}, outcomes


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    ("old", "new"), [(b"log_ppl", b"log\nppl"), (b"CREATE TABLE", b"CREATE\n\xffABLE"), (b"samples (", b"sampl\xff\n(("),
                     (b"NOT NULL", b"NOT\n\xffULL"), (b"SQLite format 3", b"SQLite format 4"),
                     (bytes([0, 0, 0, 4]), bytes([0, 0, 0, 9]))],
)  # fmt: skip
def test_a_damaged_schema_is_refused_and_the_file_given_back(tmp_path, monkeypatch, old, new, write):
    data, opens, connect = stored(tmp_path, sample()).read_bytes(), [], sqlite3.connect
    assert data.count(old) >= 1
    (tmp_path / "s").write_bytes(data.replace(old, new))
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **kw: opens.append(connect(*args, **kw)) or opens[-1])
    with refuses(DamagedError), opened(tmp_path / "s", write=write) as store:
        store.all()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        opens[0].execute("SELECT 1")


@pytest.mark.parametrize("name", ["a\nb", "a\rb"])
def test_a_message_about_an_odd_name_is_one_line(tmp_path, name):
    with refuses(DamagedError):
        SampleStore(tmp_path / name, "c")
    (tmp_path / name).mkdir()
    with refuses(ResourceError):
        SampleStore(tmp_path / name, "c", write=True)


@pytest.mark.parametrize("write", [False, True])
def test_a_cut_file_is_refused_or_its_losses_are_counted(tmp_path, write):
    samples = [sample(seed) for seed in range(60)]
    data = stored(tmp_path, *samples).read_bytes()
    for cut in [2, 15, 16, 99, 100, 511, 512, 1000, *range(4096, len(data), 4096)]:
        assert outcome(tmp_path / "cut", data[:cut], samples, write) == "DamagedError", cut
    for cut in range(1, 4096, 100):
        assert outcome(tmp_path / "cut", data[:-cut], samples, write) in ("DamagedError", "whole"), cut


@pytest.mark.parametrize("data", [b"", b"not a database, but long enough to look like one" * 30])
def test_a_file_of_another_program_is_refused(tmp_path, data):
    (tmp_path / "s").write_bytes(data)
    with refuses(DamagedError):
        SampleStore(tmp_path / "s", "c")


def test_a_database_of_another_program_is_refused(tmp_path):
    change(tmp_path / "s", "CREATE TABLE samples (name TEXT)")
    with opened(tmp_path / "s") as store, refuses(DamagedError):
        store.all()


@pytest.mark.parametrize("writable", [True, False])
def test_a_write_that_was_cut_off_without_wal_is_never_read_and_can_be_undone(tmp_path, monkeypatch, writable):
    """On a disk that is read only to this machine another one may write at any time."""
    samples = [sample(seed) for seed in range(120)]
    path = stored(tmp_path, *samples)
    cut_off(path)
    monkeypatch.setattr(os, "access", lambda path, mode: writable or mode != os.W_OK)
    before = path.read_bytes()
    with refuses(DamagedError) as caught, opened(path) as store:
        store.all()
    assert "ppf repair" in str(caught.value) and "cut off" in str(caught.value) and path.read_bytes() == before
    roll_back(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with opened(path) as store:
        assert store.all() == samples and store.damaged == 0


def test_without_wal_a_reader_who_cannot_write_sees_what_another_adds(tmp_path, monkeypatch):
    path = stored(tmp_path, sample(1))
    change(path, "PRAGMA journal_mode=DELETE")
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    monkeypatch.setattr(samples_module, "network_disk", lambda folder: "nfs4")
    with opened(path) as reader, opened(path, write=True) as writer:
        assert reader.all() == [sample(1)]
        for seed in range(2, 60):
            writer.add(sample(seed))
        assert reader.all() == [sample(seed) for seed in range(1, 60)]
