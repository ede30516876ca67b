"""How the files of some families differ from the model: other names, names without the model's own, experts one by one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_models as tiny
from builders import refuses
from ppf.errors import DamagedError
from ppf.llm.load import load_model

IDS = tiny.blocks(2, 9)


def changed(folder, name, change):
    """A folder of a tiny model whose weights went through ``change``."""
    tiny.save(folder, name)
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def answers_as_stored(folder, name):
    return torch.allclose(tiny.logits(load_model(folder).model, IDS), tiny.logits(tiny.stored(name), IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "prefix"), [("gpt_neox-parallel", "gpt_neox."), ("opt-mha", "model."), ("mixtral-gqa", "model.")])
def test_files_of_a_bare_model_load(tmp_path, name, prefix):
    folder = changed(tmp_path, name, lambda weights: {key.removeprefix(prefix): value for key, value in weights.items()})
    assert answers_as_stored(folder, name)


def test_the_old_names_and_buffers_of_gpt_neox_are_known(tmp_path):
    old = {
        f"gpt_neox.layers.{layer}.attention.{buffer}": torch.ones(1)
        for layer in range(3)
        for buffer in ("bias", "masked_bias", "rotary_emb.inv_freq")
    }
    folder = changed(tmp_path, "gpt_neox-parallel", lambda weights: weights | old)
    assert "embed_out.weight" in load_file(tmp_path / "model.safetensors") and answers_as_stored(folder, "gpt_neox-parallel")


DAMAGES = {
    "missing": lambda weights, key: {name: value for name, value in weights.items() if name != key},
    "narrow": lambda weights, key: weights | {key: weights[key][:-1].clone()},
    "extra": lambda weights, key: weights | {key.replace("experts.0", "experts.9"): weights[key].clone()},
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["mixtral-gqa", "qwen2_moe-shared"])
def test_a_damaged_expert_is_refused(tmp_path, name, damage):
    def change(weights):
        key = min(key for key in weights if ".experts.0." in key)
        return DAMAGES[damage](weights, key)

    with refuses(DamagedError):
        load_model(changed(tmp_path, name, change))
