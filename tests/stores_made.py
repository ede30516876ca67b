"""Small sample stores, whole and altered."""

import sqlite3
from contextlib import closing
from dataclasses import replace

from builders import layout, random_mask
from ppf.samples import Measurement, Sample, SampleStore

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


def change(path, sql, *values):
    """Alters a store behind its back."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(sql, values)
