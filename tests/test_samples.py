import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from contextlib import ExitStack, closing
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builders import examples, layout, random_mask, refuses
from ppf import samples
from ppf.errors import DamagedError, InUseError, ResourceError
from ppf.samples import Measurement, Sample, SampleStore, kept_matrix
from ppf.space.mask import Mask

LAYOUT = layout(layers=1, ffn=200)
WRITER = """
import sys
from ppf.samples import Sample, SampleStore
store = SampleStore(sys.argv[1], "c", write=True)
for index in range(int(sys.argv[2]), 10**9):
    digest = f"{index:032d}"
    store.add(Sample("c", digest, "spread", 0.3, (index, 2), bytes(9), "done", "", 2.5, index / 7, 4096, 0.1))
    print(digest, flush=True)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A store for many small writes."""
    with opened(tmp_path_factory.mktemp("shared") / "s", write=True) as store:
        yield store


def opened(path, context="c", write=False):
    return closing(SampleStore(path, context, write))


def sample(seed=0, context="c", purpose="spread", log_ppl=2.5, **changes):
    result = Measurement(log_ppl, 0.125, 4096, 1.5)
    return replace(Sample.of(random_mask(LAYOUT, seed), context, purpose, 0.3, 0, result), **changes)


def stored(folder, *samples):
    """A closed store, in one file."""
    path = folder / "samples.sqlite"
    with opened(path, write=True) as store:
        for one in samples:
            store.add(one)
    assert [file.name for file in folder.iterdir()] == [path.name]
    return path


def change(path, sql, *values):
    """Alters a store behind its back."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(sql, values)


# --- samples ---


def test_a_sample_says_what_was_measured_of_which_mask():
    mask = random_mask(LAYOUT, 7)
    one = Sample.of(mask, "c", "probe", np.float32(0.25), 2, Measurement(2.5, 0.125, 4096, 1.5))
    assert (one.digest, one.mask, one.kept) == (mask.digest, mask.pack(), tuple(mask.allocation.kept.tolist()))
    assert (one.context, one.purpose, one.ratio, one.round, one.status, one.reason) == ("c", "probe", 0.25, 2, "done", "")
    assert (one.log_ppl, one.kl, one.tokens, one.seconds) == (2.5, 0.125, 4096, 1.5)
    assert Mask.unpack(one.mask, LAYOUT).digest == one.digest
    with pytest.raises(FrozenInstanceError):
        one.log_ppl = 1


@pytest.mark.parametrize("log_ppl", [math.nan, math.inf, -math.inf, 2.5])
@pytest.mark.parametrize("kl", [math.nan, math.inf, 0.1])
@pytest.mark.parametrize("reason", ["", "out of memory"])
def test_what_is_not_finite_fails_with_its_reason(log_ppl, kl, reason):
    one = Sample.of(random_mask(LAYOUT), "c", "probe", 0.3, 0, Measurement(log_ppl, kl, 10, 1.0, reason))
    good = math.isfinite(log_ppl) and math.isfinite(kl) and not reason
    assert one.status == ("done" if good else "failed")
    assert bool(one.reason) is not good and reason in one.reason
    assert math.isfinite(one.log_ppl) and math.isfinite(one.kl)


def test_the_matrix_of_kept_units():
    matrix = kept_matrix([sample(seed) for seed in range(3)], LAYOUT)
    assert matrix.tolist() == [list(sample(seed).kept) for seed in range(3)] and matrix.dtype == np.int64
    assert kept_matrix([], LAYOUT).shape == (0, 2)
    with refuses(DamagedError):
        kept_matrix([sample(), sample(kept=(1, 2, 3))], LAYOUT)


# --- the store ---


def test_samples_come_back_equal_and_in_order_after_reopening(tmp_path):
    samples = [sample(seed, purpose=("probe", "search")[seed % 2]) for seed in (5, 1, 4, 2, 3)]
    path = stored(tmp_path, *samples[:3])
    with opened(path, write=True) as store:
        assert store.all() == samples[:3]
        for one in samples[3:]:
            store.add(one)
    with opened(path) as store:
        assert store.all() == samples and store.damaged == 0
        assert store.all("search") == [samples[0], samples[1], samples[4]]
        assert store.all("search", "probe") == samples and store.all("none") == []
        assert [store.get(one.digest) for one in samples] == samples and store.get("unknown") is None


@examples(50)
@given(
    st.floats() | st.integers(-9, 9),
    st.floats() | st.integers(-9, 9),
    st.integers(0, 2**40),
    st.floats(0, 1e9) | st.integers(0, 9),
    st.text(st.characters(codec="utf-8"), max_size=5),
)
@example(2.5, 0.125, 10, 1.5, "a\0b")
def test_any_measurement_comes_back(shared, log_ppl, kl, tokens, seconds, reason):
    one = Sample.of(random_mask(LAYOUT), "c", "probe", 0.3, 0, Measurement(log_ppl, kl, tokens, seconds, reason))
    shared.add(one)
    assert shared.get(one.digest) == one


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_measurements_in_numpy_numbers_come_back(shared, kind):
    one = Sample.of(random_mask(LAYOUT), "c", "probe", kind(0.25), 0, Measurement(kind(2.5), kind(0.125), np.int64(9), kind(1.5)))
    shared.add(one)
    assert shared.get(one.digest) == one


def test_minus_zero_comes_back(shared):
    one = Sample.of(random_mask(LAYOUT), "c", "probe", -0.0, 0, Measurement(1.0, -0.0, 10, 1.5))
    shared.add(one)
    assert shared.get(one.digest) == one


def test_a_sample_made_by_hand_comes_back(shared):
    one = sample(ratio=np.float32(0.25), kept=(np.int64(2), 19), log_ppl=2, kl=-0.0, tokens=np.int32(7), round=np.int64(3))
    shared.add(one)
    assert shared.get(one.digest) == one and shared.damaged == 0


def test_a_reason_that_is_no_text_is_kept_escaped(shared):
    one = Sample.of(random_mask(LAYOUT), "c", "probe", 0.3, 0, Measurement(1.0, 1.0, 10, 1.5, "no file caf\udce9"))
    shared.add(one)
    assert shared.get(one.digest) == replace(one, reason="no file caf\\udce9")


def test_one_mask_has_one_sample_the_last(tmp_path):
    failed = sample(status="failed", reason="out of memory", log_ppl=0.0)
    with opened(tmp_path / "s", write=True) as store:
        store.add(failed)
        assert (store.all(), store.failed(), store.get(failed.digest)) == ([], [failed], failed)
        store.add(sample(1))
        store.add(sample())
        assert (store.all(), store.failed(), store.get(failed.digest)) == ([sample(1), sample()], [], sample())


def test_contexts_never_mix(tmp_path):
    path = stored(tmp_path, sample(1), sample(2, context="other"), sample(1, context="other", log_ppl=9.0))
    with opened(path) as mine, opened(path, "other") as others, opened(path, "third") as none:
        assert mine.all() == [sample(1)] and mine.get(sample(2).digest) is None
        assert others.all() == [sample(2, context="other"), sample(1, context="other", log_ppl=9.0)]
        assert none.all() == [] and none.damaged == 0


def test_readers_see_what_was_added_and_cannot_write(tmp_path):
    path = stored(tmp_path, sample(1))
    with opened(path) as reader:
        assert reader.all() == [sample(1)]
        with opened(path, write=True) as writer:
            writer.add(sample(2))
            assert reader.all() == [sample(1), sample(2)]
            with refuses(ResourceError):
                reader.add(sample(3))
            writer.add(sample(4))
        assert reader.all() == [sample(1), sample(2), sample(4)]


def test_readers_create_nothing(tmp_path):
    for name in ("none", "none/at/all"):
        with refuses(DamagedError):
            SampleStore(tmp_path / name, "c")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_said(tmp_path):
    for path in (tmp_path, tmp_path / "none" / "s"):
        with refuses(ResourceError):
            SampleStore(path, "c", write=True)


def test_a_writer_who_does_not_let_go_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "_PATIENCE", 0.2)
    path = stored(tmp_path, sample(1))
    with opened(path, write=True) as store, closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with refuses(InUseError):
            store.add(sample(2))
        other.execute("ROLLBACK")
        store.add(sample(2))
        assert store.all() == [sample(1), sample(2)]


@pytest.mark.parametrize("name", ["a b", "100%41", "q?mode=memory", "h#x", "ü", "a'b"])
def test_any_file_name_will_do(tmp_path, name):
    with opened(tmp_path / name, write=True) as store:
        store.add(sample())
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with opened(tmp_path / name) as store:
        assert store.all() == [sample()]


# --- damage ---

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
    assert set(outcomes) <= {"whole", "lost", "DamagedError"}, outcomes


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


def test_two_writers_at_once_lose_nothing_and_refuse_nothing(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.samples"].__file__).parents[1])}
    commands = [[sys.executable, "-c", WRITER, str(tmp_path / "s"), str(start)] for start in (0, 10**6)]
    done = []
    with ExitStack() as stack:
        opening = (subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for command in commands)
        writers = [stack.enter_context(process) for process in opening]
        for writer in writers:
            stack.callback(writer.kill)
        for writer in writers:
            done += [writer.stdout.readline() for _ in range(150)]
        for writer in writers:
            writer.kill()
            done += writer.stdout.readlines()
    done = [line.strip() for line in done if line.endswith("\n")]
    with opened(tmp_path / "s") as store:
        found = [one.digest for one in store.all()]
    assert {line[-7] for line in done} == {"0", "1"} and len(done) >= 300
    assert store.damaged == 0 and len(found) == len(set(found)) <= len(done) + 2 and set(done) <= set(found)


def test_a_hundred_kills_of_two_writers_lose_nothing_that_was_acknowledged(tmp_path):
    command = [sys.executable, str(Path(__file__).parent / "killing.py"), str(tmp_path / "s"), "100"]
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.samples"].__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["killed"] == 200 and found["acknowledged"] > 200
    assert (found["lost"], found["twice"], found["damaged"], found["integrity"]) == (0, 0, 0, "ok")
    assert found["stored"] <= found["acknowledged"] + found["killed"]  # at most one each that was written and not yet told


def test_a_full_disk_loses_nothing_and_the_store_goes_on_when_there_is_room(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.samples"].__file__).parents[1])}
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
    done = []
    for code in (limit + WRITER, limit + WRITER, WRITER):
        command = [sys.executable, "-c", code, str(tmp_path / "s"), str(len(done))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as writer:
            lines = writer.stdout.readlines() if code != WRITER else [writer.stdout.readline() for _ in range(9)]
            writer.kill()
            errors = writer.stderr.read()
        done += [line.strip() for line in lines]
        if code != WRITER:
            assert "ResourceError" in errors and len(done) > 50
            with opened(tmp_path / "s") as store:
                assert [one.digest for one in store.all()] == done and store.damaged == 0
    assert len(set(done)) == len(done)


def test_killing_the_writer_loses_nothing_that_it_acknowledged(tmp_path):
    path, done = tmp_path / "s", []
    environment = {**os.environ, "PYTHONPATH": str(Path(sys.modules["ppf.samples"].__file__).parents[1])}
    for count in (1, 7, 40):
        command = [sys.executable, "-c", WRITER, str(path), str(len(done))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as writer:
            lines = [writer.stdout.readline() for _ in range(count)]
            os.kill(writer.pid, signal.SIGKILL)
            lines += writer.stdout.readlines()
        assert writer.returncode == -signal.SIGKILL
        done += [line.strip() for line in lines if line.endswith("\n")]
        with opened(path) as store:
            found = {one.digest for one in store.all()}
            assert store.damaged == 0 and found >= set(done) and len(found) <= len(done) + 1
        done = sorted(found)
    assert len(done) >= 48
