import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models
from ppf import cli
from ppf.config import Target
from ppf.decide import Decider
from ppf.llm.surgery import cut
from ppf.llm.text import Text
from ppf.recipes import demo
from ppf.space.policy import Policy


@pytest.fixture
def shown(fitted, place, tmp_path, monkeypatch, capsys):
    """The demo of a tiny model that is fitted already: what it was asked to fit, its folder, and what it printed."""
    asked, folder, load = [], tmp_path / "demo", demo.load_model
    shutil.copytree(fitted.folder, folder)
    monkeypatch.setattr(demo, "load_model", lambda name: load(str(place / "model")))
    monkeypatch.setattr(demo, "fit", lambda config, progress, loaded: asked.append(config))
    assert cli.main(["demo", "--out", str(folder), "--samples", "60", "--seed", "3"]) == 0
    return asked, folder, capsys.readouterr().out


def test_the_demo_fits_the_embedded_model_as_its_options_say(shown):
    ((config,), folder, _) = shown
    assert (config.model, config.study, config.samples, config.seed, config.device) == ("ref-a", str(folder), 60, 3, "cpu")


def test_the_demo_leaves_three_checkpoints_and_their_measured_figures(shown):
    _, folder, printed = shown
    decider = Decider(folder)
    text = Text.load(folder / "text.safetensors", decider.layout.fingerprint).test
    rows = [line.split() for line in printed.splitlines() if " % " in line]
    assert len(rows) == 3
    for ratio, row in zip((0.2, 0.3, 0.5), rows, strict=True):
        decision = decider.decide(Target(ratio=ratio))
        smaller = AutoModelForCausalLM.from_pretrained(folder / f"pruned-{round(100 * ratio)}")
        assert sum(parameter.numel() for parameter in smaller.parameters()) == decision.params[1]
        uniform = cut(
            tiny_models.model("llama-mha"), decider.layout, decider.decide(Target(ratio=ratio), Policy.uniform(decider.layout)).mask
        )
        assert row[:2] == [f"{100 * decision.met:.1f}", "%"]
        assert row[3:5] == [f"{perplexity(smaller, text):.2f}", f"{perplexity(uniform, text):.2f}"]


def perplexity(model, blocks):
    """By the definition, block by block."""
    loss = torch.nn.functional.cross_entropy
    found = [loss(tiny_models.logits(model, row[None])[0, :-1], torch.from_numpy(row[1:])).item() for row in blocks]
    return np.exp(np.mean(found))
