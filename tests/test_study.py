import json
import os
from contextlib import closing

import pytest

from builders import full_disk, importance, layout, names_in, random_mask, refuses
from ppf.errors import DamagedError, InputError, ResourceError
from ppf.lock import locked
from ppf.samples import Measurement, Sample
from ppf.study import _FIELDS, STUDY_VERSION, StudyFolder, context_of

LAYOUT = layout()
RECORD = {
    "model": {"name": "ref-a", "digest": "d" * 32, "bytes_per_param": 2},
    "layout": json.loads(json.dumps(LAYOUT.to_json())),
    "settings": {"samples": 600, "text": "pydocs"},
    "dense": {"search": {"log_ppl": 2.5}, "test": {"log_ppl": 2.25}},
    "context": "c" * 32,
    "seq_len": 256,
    "dtype": "float32",
    "note": "ü",
}


def made(folder):
    return StudyFolder.create(folder, RECORD)


# --- the record ---


def test_the_record_comes_back(tmp_path):
    for study in (made(tmp_path), StudyFolder(tmp_path), StudyFolder(str(tmp_path))):
        assert study.record == {"version": STUDY_VERSION, **RECORD}
        assert study.layout == LAYOUT and study.layout.fingerprint == LAYOUT.fingerprint
        assert (study.context, study.folder) == ("c" * 32, tmp_path)


def test_a_folder_without_a_study_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with refuses(InputError):
            StudyFolder(path)


@pytest.mark.parametrize("version", [0, STUDY_VERSION + 1, "1", None, ...])
def test_another_version_is_refused(tmp_path, version):
    record = {**RECORD, "version": version} if version is not ... else RECORD
    (tmp_path / "study.json").write_text(json.dumps(record))
    with refuses(DamagedError):
        StudyFolder(tmp_path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"5", b"null", b'"study"', b"\xff", b"[" * 100_000])
def test_a_record_that_is_no_object_is_refused(tmp_path, text):
    (tmp_path / "study.json").write_bytes(text)
    with refuses(DamagedError):
        StudyFolder(tmp_path)


@pytest.mark.parametrize("value", [None, 5, [1], ...])
@pytest.mark.parametrize("field", _FIELDS)
def test_a_record_without_a_field_is_refused_by_name(tmp_path, field, value):
    if isinstance(value, _FIELDS[field]):
        value = "another type"
    record = json.loads(json.dumps({"version": STUDY_VERSION, **RECORD}))
    *path, last = field.split(".")
    inner = record
    for name in path:
        inner = inner[name]
    inner[last] = value
    if value is ...:
        del inner[last]
    (tmp_path / "study.json").write_text(json.dumps(record))
    with refuses(DamagedError) as caught:
        StudyFolder(tmp_path)
    assert repr(field) in str(caught.value)


def test_a_cut_record_is_refused_wherever_it_was_cut(tmp_path):
    made(tmp_path)
    data = (tmp_path / "study.json").read_bytes()
    for size in range(0, len(data) - 2, 37):
        (tmp_path / "study.json").write_bytes(data[:size])
        with refuses(DamagedError):
            StudyFolder(tmp_path)


def test_a_damaged_layout_is_refused_when_it_is_asked_for(tmp_path):
    StudyFolder.create(tmp_path, {**RECORD, "layout": {"sites": 5}})
    with refuses(DamagedError):
        _ = StudyFolder(tmp_path).layout


def test_a_full_disk_leaves_no_study(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with refuses(ResourceError):
        made(tmp_path)
    assert names_in(tmp_path) == []


# --- what lies in it ---


def test_artefacts_are_found_by_name(tmp_path):
    study, order = made(tmp_path), importance(LAYOUT)
    assert study.path("agent") == tmp_path / "agent.safetensors"
    with refuses(DamagedError):
        _ = study.importance
    order.save(study.path("importance"), LAYOUT)
    assert [score.tolist() for score in study.importance.scores] == [score.tolist() for score in order.scores]
    importance(layout(ffn=100)).save(study.path("importance"), layout(ffn=100))
    with refuses(DamagedError):
        _ = StudyFolder(tmp_path).importance


def test_a_study_is_fitted_when_all_is_there(tmp_path):
    study = made(tmp_path)
    for name in ("agent", "importance", "nested", "predictor"):
        assert not study.is_fitted
        with refuses(InputError):
            study.check_fitted()
        study.path(name).touch()
    assert not study.is_fitted
    (tmp_path / "report.json").touch()
    assert study.is_fitted and study.check_fitted() is None


def test_samples_are_those_of_the_context(tmp_path):
    study = made(tmp_path)
    with refuses(DamagedError):
        study.store()
    one = Sample.of(random_mask(LAYOUT), study.context, "probe", 0.3, 0, Measurement(2.5, 0.1, 7, 0.5))
    with closing(study.store(write=True)) as store:
        store.add(one)
    with closing(StudyFolder(tmp_path).store()) as store:
        assert store.all() == [one]
    with closing(StudyFolder.create(tmp_path, {**RECORD, "context": "d" * 32}).store()) as store:
        assert store.all() == []


def test_plans_are_kept_beside_each_other(tmp_path):
    study = made(tmp_path)
    assert study.plan("probes") is None
    study.keep_plan("probes", [[1, 2], [3, 4]])
    study.keep_plan("round 1", {"kept": [5]})
    study.keep_plan("empty", [])
    study.keep_plan("probes", [[9]])
    again = StudyFolder(tmp_path)
    assert (again.plan("probes"), again.plan("round 1"), again.plan("empty"), again.plan("other")) == (
        [[9]],
        {"kept": [5]},
        [],
        None,
    )


def test_a_full_disk_leaves_the_older_plans(tmp_path, monkeypatch):
    study = made(tmp_path)
    study.keep_plan("probes", [1])
    with monkeypatch.context() as patched, refuses(ResourceError):
        patched.setattr(os, "fsync", full_disk)
        study.keep_plan("probes", [2])
    assert study.plan("probes") == [1]


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"5", b"\xff"])
def test_damaged_plans_are_refused(tmp_path, text):
    study = made(tmp_path)
    (tmp_path / "plans.json").write_bytes(text)
    with refuses(DamagedError):
        study.plan("probes")
    with refuses(DamagedError):
        study.keep_plan("probes", [])
    assert (tmp_path / "plans.json").read_bytes() == text


def test_readers_need_no_lock(tmp_path):
    made(tmp_path)
    with locked(tmp_path):
        assert StudyFolder(tmp_path).layout == LAYOUT


# --- the context ---


def test_the_context_depends_on_every_part_and_not_on_their_order():
    parts = {"model": "m", "text": "t", "dtype": "float32"}
    assert context_of(**parts) == context_of(**dict(reversed(parts.items()))) and len(context_of(**parts)) == 32
    others = {context_of(**{**parts, name: "other"}) for name in parts} | {context_of(**parts), context_of(**parts, seed=1)}
    assert len(others) == 5
