import math
import sqlite3
from contextlib import closing
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from builders import examples, random_mask, refuses
from ppf import samples
from ppf.errors import DamagedError, InUseError, ResourceError
from ppf.samples import Measurement, Sample, SampleStore, kept_matrix
from ppf.space.mask import Mask
from stores_made import LAYOUT, opened, sample, stored


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A store for many small writes."""
    with opened(tmp_path_factory.mktemp("shared") / "s", write=True) as store:
        yield store


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
