import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import SETTINGS

import ppf
import tiny_models
from builders import refuses
from ppf.config import FitConfig
from ppf.errors import DamagedError, InputError, InUseError
from ppf.progress import Progress
from ppf.recipes import fit as recipe
from ppf.recipes.fit import HELDOUT_RATIOS
from ppf.study import StudyFolder, locked


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


def test_held_out_masks_are_of_one_size_and_never_fitted(fitted):
    folder = StudyFolder(fitted.folder)
    store = folder.store()
    heldout = store.all("heldout")
    for ratio in HELDOUT_RATIOS:
        sizes = [int(folder.layout.kept_params(np.array(one.kept))) for one in heldout if one.ratio == ratio]
        assert len(sizes) >= 2 and max(sizes) - min(sizes) < folder.layout.costs.min()
    fitted_to = {one.digest for one in store.all("probe", "spread", "search")}
    assert not fitted_to & {one.digest for one in heldout}


def test_a_finished_fit_is_not_done_again(fitted, monkeypatch):
    monkeypatch.setattr(recipe, "fit_predictor", None)

    def written():
        return {path.name: path.stat().st_mtime_ns for path in fitted.folder.iterdir() if path.suffix in (".json", ".safetensors")}

    before = written()
    assert again(fitted).report == fitted.report
    assert written() == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"score": "flap"}, {"search_tokens": 128}, {"seq_len": 32}])
def test_a_study_of_other_settings_is_refused(fitted, change):
    with refuses(InputError) as caught:
        again(fitted, **change)
    assert "--" + next(iter(change)).replace("_", "-") in str(caught.value)


def test_a_study_of_another_model_is_refused(fitted):
    with refuses(DamagedError):
        ppf.fit(
            tiny_models.model("llama-mha", seed=1), tokenizer=tiny_models.tokenizer(), study=fitted.folder, quiet=True, **SETTINGS
        )


def test_a_study_in_use_is_refused(fitted):
    with locked(fitted.folder), refuses(InUseError):
        again(fitted)


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
    flags = {name: value for name, value in SETTINGS.items() if name != "samples"} | {"samples": 240, "workers": 1}
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
        str(place / "text.txt"),
        *words,
    ]


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
    with subprocess.Popen(command(place, study), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        deadline = time.time() + 120
        while len(measured(study)) < 10 and time.time() < deadline and first.poll() is None:
            time.sleep(0.01)
        os.kill(first.pid, way)
        _, errors = first.communicate()
    kept = measured(study)
    assert 10 <= len(kept) < 200 and not (study / "report.json").exists()
    if way == signal.SIGINT:
        assert first.returncode == 130 and errors.strip().splitlines()[-1].startswith("error: stopped")
    second = subprocess.run(command(place, study), capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    assert measured(study)[: len(kept)] == kept
    report = json.loads((study / "report.json").read_text())
    assert sum(report["samples"].values()) > 200 and report["failed"] == 0
