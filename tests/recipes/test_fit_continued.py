import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace

import pytest

import ppf
import tiny_models
from builders import refuses
from fit_runs import SETTINGS, again, command, hears_ctrl_c, measured
from ppf.errors import DamagedError, InputError, InUseError
from ppf.llm.text import Text
from ppf.lock import Holder, locked
from ppf.recipes import fit as recipe
from ppf.study import StudyFolder


def test_a_finished_fit_is_not_done_again(fitted, monkeypatch):
    monkeypatch.setattr(recipe, "fit_predictor", None)

    def written():
        return {path.name: path.stat().st_mtime_ns for path in fitted.folder.iterdir() if path.suffix in (".json", ".safetensors")}

    before = written()
    assert again(fitted.folder).report == fitted.report
    assert written() == before


@pytest.mark.parametrize("moment", ["learning", "replacing"])
def test_another_predictor_needs_no_new_sample_and_a_stop_in_between_leaves_no_mixture(fitted, tmp_path, monkeypatch, moment):
    shutil.copytree(fitted.folder, tmp_path / "copy")
    copy = ppf.Study(tmp_path / "copy")
    samples = measured(copy.folder)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*((recipe, "trained", stop) if moment == "learning" else (recipe.Agent, "save", stop)))
        with pytest.raises(KeyboardInterrupt):
            again(copy.folder, predictor="cnn")
    if moment == "learning":
        before = ppf.Study(copy.folder)
        assert before.report == fitted.report and before.policy(ratio=0.3).mask.digest == fitted.policy(ratio=0.3).mask.digest
    else:
        with refuses(InputError):
            ppf.Study(copy.folder)
    assert again(copy.folder, predictor="cnn").report["predictor"] == "cnn"
    assert measured(copy.folder) == samples


def test_figures_do_not_depend_on_which_worker_was_faster(fitted, tmp_path):
    shutil.copytree(fitted.folder, tmp_path / "copy")
    with closing(sqlite3.connect(tmp_path / "copy" / "samples.sqlite")) as db, db:
        db.execute("CREATE TABLE turned AS SELECT * FROM samples ORDER BY rowid DESC")
        db.execute("DELETE FROM samples")
        db.execute("INSERT INTO samples SELECT * FROM turned")
    (tmp_path / "copy" / "report.json").unlink()
    before, after = fitted.report, again(tmp_path / "copy").report
    assert after["cross_validated_tau"] == before["cross_validated_tau"] and after["heldout"] == before["heldout"]


def test_an_exchanged_text_is_refused(fitted, tmp_path):
    shutil.copytree(fitted.folder, tmp_path / "copy")
    folder = StudyFolder(tmp_path / "copy")
    text = Text.load(folder.path("text"), folder.layout.fingerprint)
    replace(text, search=text.search[::-1]).save(folder.path("text"), folder.layout.fingerprint)
    with refuses(DamagedError):
        again(tmp_path / "copy")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"score": "flap"}, {"search_tokens": 128}, {"seq_len": 32}, {"samples": 200}, {"rounds": 3},
        {"max_ratio": 0.5}, {"dtype": "bfloat16"},
    ],
)  # fmt: skip
def test_a_study_of_other_settings_is_refused(fitted, change):
    with refuses(InputError) as caught:
        again(fitted.folder, **change)
    assert "--" + next(iter(change)).replace("_", "-") in str(caught.value)


def test_a_study_of_another_model_is_refused(fitted):
    with refuses(DamagedError):
        ppf.fit(
            tiny_models.model("llama-mha", seed=1), tokenizer=tiny_models.tokenizer(), study=fitted.folder, quiet=True, **SETTINGS
        )


def test_a_study_in_use_is_refused(fitted):
    with locked(fitted.folder), refuses(InUseError):
        again(fitted.folder)


def test_readers_are_answered_while_another_process_writes(fitted, tmp_path):
    shutil.copytree(fitted.folder, tmp_path / "copy")
    code = f"""
import sys
from pathlib import Path
from ppf.lock import locked
from ppf.study import StudyFolder, read_sealed, write_sealed
with locked(Path({str(tmp_path / "copy")!r})):
    store = StudyFolder({str(tmp_path / "copy")!r}).store(write=True)
    samples = store.all()
    print("ready", flush=True)
    while True:
        for sample in samples:
            store.add(sample)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "ready\n"
        try:
            study = ppf.Study(tmp_path / "copy")
            for ratio in (0.2, 0.4):
                assert study.policy(ratio=ratio).mask.digest == fitted.policy(ratio=ratio).mask.digest
            assert set(measured(study.folder)) == set(measured(fitted.folder)) and study.report == fitted.report
            with refuses(InUseError) as caught:
                again(study.folder, predictor="cnn")
            assert f"process {writer.pid} " in str(caught.value) and writer.poll() is None
        finally:
            writer.kill()


def test_a_fit_says_whom_it_follows_and_tidies_up(fitted, tmp_path, capsys):
    shutil.copytree(fitted.folder, tmp_path / "copy")
    (tmp_path / "copy" / "lock").write_text(json.dumps(asdict(replace(Holder.here(), pid=2**22 + 1))))
    (tmp_path / "copy" / ".plans.json.ppf-abcdefgh").touch()
    settings = {**SETTINGS, "text": StudyFolder(fitted.folder).record["settings"]["text"]}
    model, tokenizer = tiny_models.model("llama-mha"), tiny_models.tokenizer()
    ppf.fit(model, tokenizer=tokenizer, study=tmp_path / "copy", **settings)
    assert f"process {2**22 + 1} on " in capsys.readouterr().err
    assert not list((tmp_path / "copy").glob(".*.ppf-*")) and (tmp_path / "copy" / "lock").read_text() == ""


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_fit_goes_on_without_losing_a_sample(place, tmp_path, way):
    study = tmp_path / "study"
    pipes = {"stderr": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command(place, study), preexec_fn=hears_ctrl_c, **pipes) as first:
        deadline = time.time() + 120
        while len(measured(study)) < 10 and time.time() < deadline and first.poll() is None:
            time.sleep(0.01)
        os.kill(first.pid, way)
        _, errors = first.communicate()
    kept = measured(study)
    assert len(kept) >= 10 and not (study / "report.json").exists()
    if way != signal.SIGKILL:
        assert first.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143}[way]
        assert errors.strip().splitlines()[-1].startswith("error: stopped")
    second = subprocess.run(command(place, study), capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert measured(study)[: len(kept)] == kept
    report = json.loads((study / "report.json").read_text())
    assert sum(report["samples"].values()) > 200 and report["failed"] == 0
    assert report["seconds"]["measuring probes"] > 0.1 and report["seconds"]["importance"] > 0
