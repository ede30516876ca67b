import json

import pytest
import torch

import ppf
import tiny_models
from builders import names_in, refuses
from fit_runs import SETTINGS
from ppf import cli
from ppf.config import ReportConfig
from ppf.decide import Decider
from ppf.errors import InputError
from ppf.llm.load import load_model
from ppf.report import write_report


def fit(place, study, **changes):
    options = {**SETTINGS, "max_ratio": 0.9, "depth": True, "text": str(place / "text.txt"), **changes}
    return ppf.fit(tiny_models.model("llama-mha"), tokenizer=tiny_models.tokenizer(), study=study, quiet=True, **options)


@pytest.fixture(scope="module")
def deep(place, tmp_path_factory):
    """A study in which whole sub-layers may go."""
    return fit(place, tmp_path_factory.mktemp("deep") / "study")


def test_every_sublayer_but_the_first_was_tried_as_a_whole(deep, fitted):
    layout, plain = Decider(deep.folder).layout, Decider(fitted.folder).layout
    assert layout.floors.tolist() == [1, 0, 0, 0, 0, 0] and layout.fingerprint != plain.fingerprint
    store = Decider(deep.folder).study.store()
    tried = {site for sample in store.all("probe") for site, kept in enumerate(sample.kept) if kept == 0}
    store.close()
    assert tried == {1, 2, 3, 4, 5}


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
def test_any_ratio_is_decided_cut_and_exported(deep, place, tmp_path, capsys, ratio):
    pruned = deep.prune(ratio=ratio, device="cpu")
    kept, layout = pruned.decision.allocation.kept, Decider(deep.folder).layout
    assert pruned.plan["params"]["after"] == layout.kept_params(kept) == sum(one.numel() for one in pruned.model.parameters())
    assert ratio <= pruned.plan["ratio"]["met"] <= ratio + 0.01
    pruned.save_pretrained(tmp_path / "out")
    again = load_model(str(tmp_path / "out"))
    blocks = tiny_models.blocks(2)
    assert torch.equal(tiny_models.logits(again.model, blocks), tiny_models.logits(pruned.model, blocks))
    command = ["prune", str(place / "model"), "--plan", str(tmp_path / "out" / "ppf.json"), "--out", str(tmp_path / "planned")]
    assert cli.main(command) == 0 and ("gone whole" in capsys.readouterr().out) is bool((kept == 0).any())
    assert (tmp_path / "planned" / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()
    if ratio == 0.9:
        assert (kept == 0).any()


def test_policies_and_reports_show_what_is_gone(deep, tmp_path, capsys):
    assert cli.main(["policy", str(deep.folder), "--ratio", "0.9"]) == 0
    out = capsys.readouterr().out
    assert "0 of " in out and "gone whole" in out
    assert cli.main(["policy", str(deep.folder), "--ratio", "0.9", "--json"]) == 0
    assert 0 in {entry["kept"] for entry in json.loads(capsys.readouterr().out)["kept"]}
    write_report(ReportConfig(str(deep.folder), str(tmp_path / "report.html")))
    assert names_in(tmp_path) == ["report.html"]


def test_a_study_stays_with_or_without_depth(deep, place):
    with refuses(InputError) as caught:
        fit(place, deep.folder, depth=False)
    assert "--depth" in str(caught.value)
