"""Figures measured in another way never mix: each thing that they depend on is named when it differs."""

import pytest
import torch

import ppf
import tiny_models
from builders import copied, refuses
from fit_runs import SETTINGS, again
from ppf.errors import DamagedError
from ppf.llm.hub import revision_of
from ppf.llm.load import adopt_model, tokenizer_digest
from ppf.recipes.lab import Lab
from ppf.recipes.protocol import check_protocol, protocol_of
from ppf.study import StudyFolder, read_sealed, write_sealed

FIELDS = ["weights", "revision", "tokenizer", "corpus", "window", "stride", "dtype", "formula"]


def test_a_study_keeps_every_field(fitted):
    kept = StudyFolder(fitted.folder).record["protocol"]
    assert list(kept) == FIELDS and kept["revision"] is None and all(kept[name] for name in FIELDS if name != "revision")
    assert StudyFolder(fitted.folder).record["made_by"] == {"ppf": ppf.__version__}


@pytest.mark.parametrize("field", FIELDS)
def test_a_field_that_differs_is_refused_by_name(fitted, tmp_path, field):
    study = StudyFolder(copied(fitted, tmp_path / "study"))
    now = dict(study.record["protocol"]) | {"revision": "a" * 40}
    study.record["protocol"]["revision"] = "a" * 40
    check_protocol(study, now)
    with refuses(DamagedError) as caught:
        check_protocol(study, now | {field: "another"})
    assert f"its {field} was" in str(caught.value)


def test_going_on_checks_it(fitted, tmp_path):
    folder = copied(fitted, tmp_path / "study")
    record = read_sealed(folder / "study.json")
    write_sealed(folder / "study.json", record | {"protocol": record["protocol"] | {"tokenizer": "0" * 32}})
    with refuses(DamagedError) as caught:
        again(folder)
    assert "its tokenizer was" in str(caught.value)
    del record["protocol"]
    write_sealed(folder / "study.json", record)
    assert again(folder).report == fitted.report  # one of before this was kept


def test_a_commit_counts_only_where_both_have_one(fitted, tmp_path):
    study = StudyFolder(copied(fitted, tmp_path / "study"))
    check_protocol(study, dict(study.record["protocol"]) | {"revision": "b" * 40})


def test_it_is_of_what_is_measured(fitted):
    loaded = adopt_model(tiny_models.model("llama-mha"), tiny_models.tokenizer())
    text = type("Text", (), {"search": tiny_models.blocks(), "digest": "d"})()
    found = protocol_of(loaded, text, torch.bfloat16)
    assert (found["window"], found["stride"], found["dtype"], found["corpus"]) == (12, 12, "bfloat16", "d")
    assert found["weights"] == loaded.digest and found["revision"] == revision_of(loaded.folder)


def test_the_tokenizer_is_told_by_how_it_splits():
    one, other, padded = tiny_models.tokenizer(), tiny_models.tokenizer(50), tiny_models.tokenizer()
    padded(["w3", "w4 w5"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(one) == tokenizer_digest(padded) != tokenizer_digest(other)


def test_a_model_that_is_no_better_than_guessing_is_told(place, tmp_path, capsys, monkeypatch):
    def stop(lab):
        raise KeyboardInterrupt

    monkeypatch.setattr(Lab, "score", stop)
    settings = {**SETTINGS, "text": str(place / "text.txt")}
    with pytest.raises(KeyboardInterrupt):
        ppf.fit(tiny_models.model("llama-mha"), tokenizer=tiny_models.tokenizer(), study=tmp_path / "s", **settings)
    assert "no better than guessing" in capsys.readouterr().err
