"""Small sample stores, whole and altered."""

import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

from builders import layout, random_mask
from ppf.samples import Measurement, Sample, SampleStore
from ppf.study import StudyFolder

LAYOUT = layout(layers=1, ffn=200)


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


CUT_OFF = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
for pragma in ("journal_mode=DELETE", "cache_size=1"):
    db.execute("PRAGMA " + pragma)
db.execute("BEGIN IMMEDIATE")
db.execute("UPDATE samples SET reason = ?", ["x" * 5000])
os._exit(0)
"""


def cut_off(path):
    """Kills one who writes without WAL, when some of it has reached the file already."""
    before = path.read_bytes()
    subprocess.run([sys.executable, "-c", CUT_OFF, str(path)], check=True)
    assert path.read_bytes()[100:] != before[100:] and path.with_name(f"{path.name}-journal").stat().st_size


def change(path, sql, *values):
    """Alters a store behind its back."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(sql, values)


def zero(path, page):
    """Takes a page away, as a disk does that loses it."""
    data = path.read_bytes()
    path.write_bytes(data[: 4096 * page] + bytes(4096) + data[4096 * (page + 1) :])


def samples_of(folder):
    """All samples of a study."""
    with closing(StudyFolder(folder).store()) as store:
        return store.all()
