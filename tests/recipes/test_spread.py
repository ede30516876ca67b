"""Models that memory does not hold as a whole, from the command line and from Python."""

import json
from contextlib import closing

import numpy as np
import pytest
import torch

import ppf
from builders import refuses
from fit_runs import SETTINGS
from ppf import cli
from ppf.errors import InputError
from ppf.recipes import evaluate as recipe

SOME = "cpu=60KB"
"""About half of the tiny model, which has 100 kB in float32."""


@pytest.fixture
def spread(monkeypatch):
    """Devices of the weights of each model that is measured; a weight on meta is in its file."""
    seen, own = [], recipe.measure

    def noted(model, *arguments):
        seen.append({weight.device.type for weight in model.parameters()})
        return own(model, *arguments)

    monkeypatch.setattr(recipe, "measure", noted)
    return seen


def test_eval_gives_the_same_figures(capsys, place, spread):
    figures = []
    for device in ("cpu", SOME, "cpu=1B"):
        command = ["eval", place / "model", "--text", place / "text.txt", "--seq-len", 16, "--device", device, "--json"]
        assert cli.main([str(part) for part in command]) == 0
        figures.append(json.loads(capsys.readouterr().out))
    assert figures[0] == figures[1] == figures[2]
    assert spread == [{"cpu"}, {"cpu", "meta"}, {"meta"}]


def test_prune_gives_the_same_model(fitted):
    whole, parts = (fitted.prune(ratio=0.4, device=device) for device in ("cpu", SOME))
    assert parts.plan["measured"] == whole.plan["measured"]
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with refuses(InputError) as caught:
        fitted.prune(ratio=0.4, device=SOME, compensate="bias")
    assert "one device" in str(caught.value)


def test_a_fit_measures_the_same_damage(place, fitted, tmp_path):
    settings = {**SETTINGS, "device": SOME}
    study = ppf.fit(place / "model", study=tmp_path / "study", text=str(place / "text.txt"), quiet=True, **settings)
    found, expected = (one._decider.study for one in (study, fitted))
    with closing(found.store()) as ours, closing(expected.store()) as theirs:
        samples = {sample.digest: sample.kl for sample in theirs.all("probe")}
        assert samples and all(np.isclose(sample.kl, samples[sample.digest], atol=1e-6) for sample in ours.all("probe"))
