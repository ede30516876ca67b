import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import SETTINGS
from transformers import AutoModelForCausalLM

import ppf
import tiny_models
from builders import refuses
from ppf.config import FitConfig, ReportConfig
from ppf.errors import DamagedError, InputError, InUseError, ResourceError
from ppf.learn.agent import Agent
from ppf.llm.text import Text
from ppf.lock import Holder, locked
from ppf.progress import Progress
from ppf.recipes import fit as recipe
from ppf.recipes.fit import HELDOUT_RATIOS
from ppf.recipes.lab import Lab, settings_of
from ppf.report import write_report
from ppf.study import StudyFolder, read_sealed, write_sealed


def again(study, **changes):
    """The same fit once more."""
    record = StudyFolder(study.folder).record["settings"]
    model, tokenizer = tiny_models.model("llama-mha"), tiny_models.tokenizer()
    settings = {**SETTINGS, "text": record["text"], **changes}
    return ppf.fit(model, tokenizer=tokenizer, study=study.folder, quiet=True, **settings)


def test_the_report_has_the_figures_of_every_predictor(fitted):
    report = fitted.report
    assert report["predictor"] in report["heldout"] and set(report["heldout"]) == {"additive", "corrected", "cnn"}
    for found in report["heldout"].values():
        assert found["count"] == report["samples"]["heldout"] and 0 <= found["mse"] <= 1
        assert set(found["tau_within"]) == {f"{ratio:g}" for ratio in HELDOUT_RATIOS}
        assert all(-1 <= value <= 1 for value in [found["tau"], *found["tau_within"].values()])
    assert sum(report["samples"].values()) + report["failed"] <= SETTINGS["samples"]
    assert sum(report["samples"].values()) >= 0.9 * SETTINGS["samples"]  # two plans may want the same mask
    assert report["tokens"]["measured"] == 256 * sum(report["samples"].values())
    assert {"importance", "predictor", "agent", "measuring probes"} <= set(report["seconds"])


def test_every_stage_is_planned_in_its_order(fitted):
    ran, planned = list(fitted.report["seconds"]), recipe._stages(FitConfig("", "s", rounds=SETTINGS["rounds"]))
    assert [name for name in planned if name in ran] == ran and set(planned) - set(ran) == {"loading"}


def test_the_best_so_far_is_of_one_ratio(fitted):
    lab = SimpleNamespace(config=FitConfig("", "s"), study=StudyFolder(fitted.folder), _best=math.inf)
    dense = lab.study.record["dense"]["search"]["log_ppl"]

    def told(ratio, rise, purpose="search"):
        return Lab._best_so_far(lab, SimpleNamespace(status="done", purpose=purpose, ratio=ratio, log_ppl=dense + rise))

    assert told(0.6, 0.1) == told(0.3, 0.1, "probe") == ""
    assert told(0.31, 0.5) == "best at 30 %: +0.5000"
    assert told(0.3, 0.7) == told(0.1, 0.01) == "best at 30 %: +0.5000"
    assert told(0.28, 0.2) == "best at 30 %: +0.2000"


def test_the_study_can_be_shown(fitted, tmp_path):
    pytest.importorskip("plotly")
    out = write_report(ReportConfig(str(fitted.folder), str(tmp_path / "report.html")))
    assert f"<td>ppf {ppf.__version__}, python {fitted.report['made']['machine']['python']}" in out.read_text()


def test_held_out_masks_are_of_one_size_and_never_fitted(fitted):
    folder = StudyFolder(fitted.folder)
    store = folder.store()
    heldout = store.all("heldout")
    for ratio in HELDOUT_RATIOS:
        sizes = [int(folder.layout.kept_params(np.array(one.kept))) for one in heldout if one.ratio == ratio]
        assert len(sizes) >= 2 and max(sizes) - min(sizes) < folder.layout.costs.min()
    fitted_to = {one.digest for one in store.all("probe", "spread", "search")}
    assert not fitted_to & {one.digest for one in heldout}


def test_held_out_masks_come_last_and_lie_around_the_agent_s_policies(fitted):
    folder = StudyFolder(fitted.folder)
    purposes = [one.purpose for one in folder.store().all()]
    heldout = folder.store().all("heldout")
    assert purposes[-len(heldout) :] == ["heldout"] * len(heldout)
    keep = np.array([one.kept for one in heldout]) / folder.layout.units
    ratios = np.array([one.ratio for one in heldout])
    agent = Agent.load(folder.path("agent"), folder.layout)
    ours = agent.kept(ratios, folder.layout) / folder.layout.units
    turned = ours[:, ::-1].reshape(len(ours), -1, 2)[:, :, ::-1].reshape(ours.shape)  # the same layers in another order
    assert ((keep - ours) ** 2).mean() < ((keep - turned) ** 2).mean()


def test_a_finished_fit_is_not_done_again(fitted, monkeypatch):
    monkeypatch.setattr(recipe, "fit_predictor", None)

    def written():
        return {path.name: path.stat().st_mtime_ns for path in fitted.folder.iterdir() if path.suffix in (".json", ".safetensors")}

    before = written()
    assert again(fitted).report == fitted.report
    assert written() == before


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"score": "flap"}, {"search_tokens": 128}, {"seq_len": 32}, {"samples": 200}, {"rounds": 3},
        {"max_ratio": 0.5}, {"dtype": "bfloat16"},
    ],
)  # fmt: skip
def test_a_study_of_other_settings_is_refused(fitted, change):
    with refuses(InputError) as caught:
        again(fitted, **change)
    assert "--" + next(iter(change)).replace("_", "-") in str(caught.value)


def test_another_predictor_needs_no_new_sample_and_a_stop_in_between_leaves_no_mixture(fitted, tmp_path, monkeypatch):
    shutil.copytree(fitted.folder, tmp_path / "copy")
    copy = ppf.Study(tmp_path / "copy")
    samples = measured(copy.folder)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "trained", stop)
        with pytest.raises(KeyboardInterrupt):
            again(copy, predictor="cnn")
    with refuses(InputError):
        ppf.Study(copy.folder)
    assert again(copy, predictor="cnn").report["predictor"] == "cnn"
    assert measured(copy.folder) == samples


def test_figures_do_not_depend_on_which_worker_was_faster(fitted, tmp_path):
    shutil.copytree(fitted.folder, tmp_path / "copy")
    with closing(sqlite3.connect(tmp_path / "copy" / "samples.sqlite")) as db, db:
        db.execute("CREATE TABLE turned AS SELECT * FROM samples ORDER BY rowid DESC")
        db.execute("DELETE FROM samples")
        db.execute("INSERT INTO samples SELECT * FROM turned")
    (tmp_path / "copy" / "report.json").unlink()
    before, after = fitted.report, again(ppf_folder(tmp_path / "copy")).report
    assert after["cross_validated_tau"] == before["cross_validated_tau"] and after["heldout"] == before["heldout"]


def test_an_exchanged_text_is_refused(fitted, tmp_path):
    shutil.copytree(fitted.folder, tmp_path / "copy")
    folder = StudyFolder(tmp_path / "copy")
    text = Text.load(folder.path("text"), folder.layout.fingerprint)
    replace(text, search=text.search[::-1]).save(folder.path("text"), folder.layout.fingerprint)
    with refuses(DamagedError):
        again(ppf_folder(tmp_path / "copy"))


@pytest.mark.parametrize(
    "changes", [{"samples": 24, "rounds": 1}, {"samples": 40, "max_ratio": 0.15}, {"samples": 30, "rounds": 0}]
)
def test_small_fits_have_a_report_too(place, tmp_path, changes):
    model, tokenizer = tiny_models.model("llama-mha"), tiny_models.tokenizer()
    settings = {**SETTINGS, **changes}
    study = ppf.fit(model, tokenizer=tokenizer, study=tmp_path / "s", text=place / "text.txt", quiet=True, **settings)
    assert all(found["count"] >= 4 and len(found["tau_within"]) >= 2 for found in study.report["heldout"].values())


@pytest.mark.parametrize(
    "wrong", [{"text": "none.txt"}, {"device": "meta"}, {"seq_len": 65}, {"test_tokens": 1, "seq_len": 64, "text": "short"}]
)
def test_a_fit_that_cannot_begin_leaves_nothing(place, tmp_path, wrong):
    (tmp_path / "short.txt").write_text("w3 w4")
    if wrong.get("text") == "short":
        wrong = {**wrong, "text": str(tmp_path / "short.txt")}
    settings = {**SETTINGS, "text": str(place / "text.txt"), **wrong}
    with refuses(InputError):
        ppf.fit(tiny_models.model("llama-mha"), tokenizer=tiny_models.tokenizer(), study=tmp_path / "s", quiet=True, **settings)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    "wrong", [{"samples": "many"}, {"score": "best"}, {"predictor": "oracle"}, {"dtype": "float8"}, {"text": 5}]
)
def test_settings_of_a_wrong_type_are_refused_at_once(tmp_path, wrong):
    with refuses(InputError):
        ppf.fit("none", study=tmp_path / "s", **wrong)
    assert not (tmp_path / "s").exists()


def test_a_study_knows_where_its_model_lies(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    loaded = AutoModelForCausalLM.from_pretrained("model")
    study = ppf.fit(loaded, study=tmp_path / "s", text="text.txt", quiet=True, **{**SETTINGS, "samples": 30, "rounds": 0})
    monkeypatch.chdir(tmp_path)
    assert study.prune(ratio=0.3).plan["model"]["name"] == "model"
    assert ppf.Study(tmp_path / "s").prune(ratio=0.3).plan["model"]["name"] == "model"


def test_a_study_of_an_object_from_nowhere_asks_for_it(fitted):
    with refuses(InputError):
        ppf.Study(fitted.folder).prune(ratio=0.3)
    study = ppf.Study(fitted.folder, tiny_models.model("llama-mha"), tiny_models.tokenizer())
    assert study.prune(ratio=0.3).plan["refined"] is False


def ppf_folder(folder):
    """Something with a folder, for ``again``."""
    return SimpleNamespace(folder=folder)


def test_a_study_of_another_model_is_refused(fitted):
    with refuses(DamagedError):
        ppf.fit(
            tiny_models.model("llama-mha", seed=1), tokenizer=tiny_models.tokenizer(), study=fitted.folder, quiet=True, **SETTINGS
        )


def test_a_study_in_use_is_refused(fitted):
    with locked(fitted.folder), refuses(InUseError):
        again(fitted)


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
                again(study, predictor="cnn")
            assert f"process {writer.pid} " in str(caught.value) and writer.poll() is None
        finally:
            writer.kill()


def test_what_is_measured_later_is_measured_here_wherever_the_fit_was(fitted, tmp_path):
    shutil.copytree(fitted.folder, tmp_path / "copy")
    record = read_sealed(tmp_path / "copy" / "study.json")
    record["settings"] |= {"engine": "ray", "ray_address": "10.0.0.1:6379", "gpus_per_worker": 1.0}
    write_sealed(tmp_path / "copy" / "study.json", record)
    found = settings_of(StudyFolder(tmp_path / "copy"), study="s", workers=1)
    assert (found.engine, found.ray_address, found.gpus_per_worker, found.workers) == ("local", None, None, 1)
    assert found.search_tokens == SETTINGS["search_tokens"]


def test_ray_is_refused_at_once_where_it_cannot_work(tmp_path, monkeypatch):
    model, tokenizer = tiny_models.model("llama-mha"), tiny_models.tokenizer()
    with refuses(InputError) as caught:
        ppf.fit(model, tokenizer=tokenizer, study=tmp_path / "s", engine="ray", quiet=True)
    assert "folder or hub id" in str(caught.value)
    monkeypatch.setitem(sys.modules, "ray", None)
    with refuses(ResourceError) as caught:
        recipe.fit(FitConfig("no such model", str(tmp_path / "s"), engine="ray"), Progress(quiet=True))
    assert "pip install 'ppf[ray]'" in str(caught.value) and not (tmp_path / "s").exists()


def test_a_fit_says_whom_it_follows_and_tidies_up(fitted, tmp_path, capsys):
    shutil.copytree(fitted.folder, tmp_path / "copy")
    (tmp_path / "copy" / "lock").write_text(json.dumps(asdict(replace(Holder.here(), pid=2**22 + 1))))
    (tmp_path / "copy" / ".plans.json.ppf-abcdefgh").touch()
    settings = {**SETTINGS, "text": StudyFolder(fitted.folder).record["settings"]["text"]}
    model, tokenizer = tiny_models.model("llama-mha"), tiny_models.tokenizer()
    ppf.fit(model, tokenizer=tokenizer, study=tmp_path / "copy", **settings)
    assert f"process {2**22 + 1} on " in capsys.readouterr().err
    assert not list((tmp_path / "copy").glob(".*.ppf-*")) and (tmp_path / "copy" / "lock").read_text() == ""


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("x")
    with refuses(InputError):
        recipe.fit(FitConfig("ref-a", str(tmp_path)), Progress(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_few_samples_for_the_model_are_refused(tmp_path):
    with refuses(InputError) as caught:
        recipe.fit(FitConfig("ref-a", str(tmp_path / "s"), samples=20), Progress(quiet=True))
    assert "--samples" in str(caught.value)


def test_the_model_given_is_not_changed(place, tmp_path):
    model = tiny_models.model("qwen3-gqa")
    before = tiny_models.snapshot(model)
    settings = {**SETTINGS, "samples": 30, "rounds": 0, "dtype": "bfloat16"}
    study = ppf.fit(
        model, tokenizer=tiny_models.tokenizer(), study=tmp_path / "s", text=str(place / "text.txt"), quiet=True, **settings
    )
    study.prune(ratio=0.3)
    assert tiny_models.snapshot(model) == before


def test_a_setting_that_does_not_exist_is_named():
    with refuses(InputError) as caught:
        ppf.fit("ref-a", sample=3)
    assert "'sample'" in str(caught.value)


def command(place, study):
    flags = {name: value for name, value in SETTINGS.items() if name not in ("samples", "search_tokens")}
    flags |= {"samples": 240, "workers": 1, "search_tokens": 8192}  # long enough to be stopped in the middle
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    return [
        sys.executable,
        "-m",
        "ppf",
        "fit",
        str(place / "model"),
        "--study",
        str(study),
        "--text",
        str(place / "long.txt"),
        *words,
    ]


def hears_ctrl_c():
    """Whoever runs the tests in the background has its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def measured(study):
    """Digests in the order in which they were measured."""
    if not (study / "study.json").exists() or not (study / "samples.sqlite").exists():
        return []
    try:
        return [one.digest for one in StudyFolder(study).store().all()]
    except DamagedError:  # its table is not there yet
        return []


@pytest.mark.parametrize("way", [signal.SIGKILL, signal.SIGINT])
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
    if way == signal.SIGINT:
        assert first.returncode == 130 and errors.strip().splitlines()[-1].startswith("error: stopped")
    second = subprocess.run(command(place, study), capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert measured(study)[: len(kept)] == kept
    report = json.loads((study / "report.json").read_text())
    assert sum(report["samples"].values()) > 200 and report["failed"] == 0
    assert report["seconds"]["measuring probes"] > 0.1 and report["seconds"]["importance"] > 0
