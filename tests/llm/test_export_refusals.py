import json
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel

import tiny_models as tiny
from builders import refuses
from exports import smaller
from ppf.errors import DamagedError, InputError, ResourceError
from ppf.llm.export import export

PLAN = {"ratio": 0.3}


def test_only_an_earlier_export_is_replaced_and_only_by_force(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    with refuses(InputError):
        export(smaller(), tiny.tokenizer(), PLAN, out)
    with refuses(InputError):
        export(smaller(), tiny.tokenizer(), PLAN, out, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "mine"]
    (out / "ppf.json").touch()
    export(smaller(), tiny.tokenizer(), PLAN, out, force=True)
    assert not (out / "mine").exists() and (out / "config.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_way_is_never_replaced(tmp_path, force):
    (tmp_path / "out").write_text("keep")
    with refuses(InputError):
        export(smaller(), tiny.tokenizer(), PLAN, tmp_path / "out", force=force)
    assert (tmp_path / "out").read_text() == "keep" and len(list(tmp_path.iterdir())) == 1


def flip_a_bit(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-2] ^= 0x40
    path.write_bytes(data)


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def widen_a_layer(folder):
    config = json.loads((folder / "config.json").read_text())
    config["per_layer_config"]["1"] = {"intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(config))


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "cut weights": cut_weights,
    "no config": lambda folder: (folder / "config.json").unlink(),
    "another width": widen_a_layer,
}


@pytest.mark.parametrize("there", ["nothing", "an older export"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_does_not_reload_alike_leaves_nothing_behind(tmp_path, monkeypatch, damage, there):
    out, save = tmp_path / "out", PreTrainedModel.save_pretrained
    if there != "nothing":
        export(smaller(seed=9), tiny.tokenizer(), {"older": True}, out)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def save_badly(model, folder):
        save(model, folder)
        DAMAGES[damage](folder)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_badly)
    with refuses(DamagedError):
        export(smaller(), tiny.tokenizer(), PLAN, out, force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert {path.name for path in tmp_path.iterdir()} == ({"out"} if before else set())


def test_a_model_that_answers_nothing_finite_is_refused(tmp_path):
    model = smaller()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with refuses(DamagedError):
        export(model, tiny.tokenizer(), PLAN, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_and_leaves_nothing_behind(tmp_path):
    model, limits = smaller(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        with refuses(ResourceError):
            export(model, tiny.tokenizer(), PLAN, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with refuses(ResourceError) as caught:
        export(smaller(), tiny.tokenizer(), PLAN, tmp_path / "not" / "yet" / "out")
    assert "1,000 are free" in str(caught.value) and list(tmp_path.iterdir()) == []
