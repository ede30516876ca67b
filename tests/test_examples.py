"""Every example runs, on tiny models in place of real ones."""

import json
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest

import ppf
import tiny_models
from ppf.llm import architectures, auto
from ppf.study import read_sealed, write_sealed

EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = {
    "samples": 40, "rounds": 0, "calibration_tokens": 128, "search_tokens": 256, "validation_tokens": 256, "test_tokens": 512,
    "seq_len": 16, "device": "cpu", "quiet": True,
}  # fmt: skip


def main_of(name):
    """What an example does when it is called."""
    return runpy.run_path(str(EXAMPLES / name))["main"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny model, a text, and a study of the model."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_models.save(folder / "model", "llama-mha")
    words = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 6000)
    (folder / "text.txt").write_text(" ".join(f"w{index}" for index in words))
    model, tokenizer = tiny_models.model("llama-mha"), tiny_models.tokenizer()
    ppf.fit(model, tokenizer=tokenizer, text=folder / "text.txt", study=folder / "study", **SETTINGS)
    return folder


def test_every_example_is_tested():
    code = Path(__file__).read_text()
    assert all(path.name in code for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb"))


def copied(place, folder):
    """The study in another place, of the model in its folder."""
    shutil.copytree(place / "study", folder)
    record = read_sealed(folder / "study.json")
    record["model"]["name"] = str(place / "model")
    write_sealed(folder / "study.json", record)
    return str(folder)


def test_fit_and_prune(place, tmp_path, capsys):
    """The fit is at hand already, so the example goes on with it."""
    copied(place, tmp_path / "study")
    main_of("fit_and_prune.py")(str(place / "model"), str(place / "text.txt"), str(tmp_path), **SETTINGS)
    printed = capsys.readouterr().out
    after = json.loads((tmp_path / "smaller" / "ppf.json").read_text())["params"]["after"]
    assert f"loaded again: {after:,} parameters" in printed and printed.count("nats/token") == 3


def test_fit_your_own_model_object(place, tmp_path, capsys):
    model = tiny_models.model("llama-mha")
    before, study = tiny_models.snapshot(model), copied(place, tmp_path / "study")
    example = main_of("fit_your_own_model_object.py")
    pruned = example(model, tiny_models.tokenizer(), str(place / "text.txt"), study=study, **SETTINGS)
    assert tiny_models.snapshot(model) == before
    assert pruned.plan["refined"] and "measured perplexity" in capsys.readouterr().out


def test_bring_your_own_objective(place):
    """What the price is put on goes."""
    usual, searched = main_of("bring_your_own_objective.py")(str(place / "study"), ratio=0.3, price=50.0, steps=8)
    layout = ppf.Decider(place / "study").layout
    cache = np.array([site.cache for site in layout.sites])
    assert searched.allocation.kept @ cache < usual.allocation.kept @ cache
    assert searched.met >= 0.3


def test_add_a_family(tmp_path, monkeypatch):
    for registry in (architectures.FAMILIES, architectures.ENTRANCES, auto.PRUNED):
        for name, value in list(registry.items()):
            monkeypatch.setitem(registry, name, value)
        monkeypatch.setitem(registry, "arcee", None)  # so that it is taken out again afterwards
    assert main_of("add_a_family.py")(str(tmp_path / "smaller")) == 0


def test_apply_a_plan(place, tmp_path):
    record = main_of("apply_a_plan.py")(str(place / "model"), 3, str(tmp_path))
    assert record["params"]["after"] < record["params"]["before"]
    kept = {(site["layer"], site["kind"]): site["kept"] / site["of"] for site in record["kept"]}
    assert kept[2, "ffn"] > kept[1, "ffn"]


CELLS = json.loads((EXAMPLES / "story.ipynb").read_text(encoding="utf-8"))["cells"]


def test_the_notebook_holds_no_output():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in CELLS if cell["cell_type"] == "code")


@pytest.mark.slow
def test_story(place, tmp_path, capsys):
    """Cell after cell, with a tiny study in place of the one that it names."""
    matplotlib = pytest.importorskip("matplotlib", reason="needs ppf[bench]")
    matplotlib.use("Agg")
    given = {"MODEL": str(place / "model"), "TEXT": str(place / "text.txt"), "SETTINGS": SETTINGS}
    given["STUDY"] = copied(place, tmp_path / "study")
    found: dict[str, object] = {}
    for cell in CELLS:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "story.ipynb", "exec"), found)
            found |= given if "parameters" in cell["metadata"].get("tags", []) else {}
    figures = [matplotlib.pyplot.figure(number) for number in matplotlib.pyplot.get_fignums()]
    assert len(figures) == 4 and all(axis.has_data() for figure in figures for axis in figure.axes)
    assert capsys.readouterr().out.count("measured") == sum(ratio < 0.65 for ratio in found["RATIOS"])
    matplotlib.pyplot.close("all")
