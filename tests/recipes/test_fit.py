import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

import ppf
import tiny_models
from builders import refuses
from fit_runs import SETTINGS
from ppf.config import FitConfig, ReportConfig
from ppf.errors import InputError, ResourceError
from ppf.learn.agent import Agent
from ppf.progress import Progress
from ppf.recipes import fit as recipe
from ppf.recipes.fit import HELDOUT_RATIOS
from ppf.recipes.lab import Lab, settings_of
from ppf.report import write_report
from ppf.study import StudyFolder, read_sealed, write_sealed


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
