"""A store of every version that there was, as text; the bytes of a row and its CRC must never come out otherwise."""

import math
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from builders import layout, random_mask, refuses
from ppf.errors import DamagedError, NewerError
from ppf.samples import STORE_VERSION, Measurement, Sample, SampleStore
from ppf.study import STUDY_VERSION, StudyFolder

STORES = sorted((Path(__file__).parent / "stores").glob("*.sql"))
LAYOUT = layout(layers=1, ffn=200)


def restored(script, path):
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)
    return path


def expected():
    for seed in range(4):
        result = Measurement(2.5 + seed, math.nan if seed == 3 else 0.125, 4096, 1.5)
        yield Sample.of(random_mask(LAYOUT, seed), "c", ("probe", "spread")[seed % 2], 0.25 * seed, seed, result)


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize("store", STORES, ids=lambda path: path.stem)
def test_every_version_opens_with_all_its_samples(tmp_path, store, write):
    path = restored(store.read_text(), tmp_path / "s")
    with closing(SampleStore(path, "c", write)) as opened:
        assert opened.all() + opened.failed() == list(expected()) and opened.damaged == 0
    with closing(sqlite3.connect(path)) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == (STORE_VERSION if write else int(store.stem[-1]))


def test_there_is_a_store_of_every_version():
    assert [path.stem for path in STORES] == [f"version_{number}" for number in range(STORE_VERSION + 1)]


@pytest.mark.parametrize("write", [False, True])
def test_a_newer_one_is_refused_without_a_change(tmp_path, write):
    newer = re.sub(r"user_version=\d+", f"user_version={STORE_VERSION + 1}", STORES[-1].read_text())
    path = restored(newer, tmp_path / "s")
    before = path.read_bytes()
    with refuses(NewerError) as caught:
        SampleStore(path, "c", write)
    assert "newer ppf" in str(caught.value) and path.read_bytes() == before


@pytest.mark.parametrize(("version", "advice"), [(STUDY_VERSION + 1, "newer ppf"), (STUDY_VERSION - 1, "fit again"), ("x", "fit")])
def test_a_study_of_another_version_says_what_can_be_done(tmp_path, version, advice):
    (tmp_path / "study.json").write_text(f'{{"version": {version if isinstance(version, int) else chr(34) + version + chr(34)}}}')
    with refuses(DamagedError) as caught:
        StudyFolder(tmp_path)
    assert advice in str(caught.value) and str(version) in str(caught.value)
