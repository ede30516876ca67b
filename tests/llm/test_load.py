import copy
import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel, PreTrainedConfig

import tiny_models as tiny
from builders import random_mask, refuses
from ppf.errors import DamagedError, InputError, PPFError, ResourceError, UnsupportedError
from ppf.llm import hub as module
from ppf.llm import load
from ppf.llm.architectures import layout_of_model
from ppf.llm.experts import separate_experts
from ppf.llm.load import adopt_model, load_model, model_digest, resolve
from ppf.llm.placement import Placement, convert
from ppf.llm.surgery import cut

IDS = tiny.blocks(2, 9)
REPLY = SimpleNamespace(headers={}, request=None)


def answers(model):
    """Its logits, all weights aligned alike: products of few rows, as experts have, round by where in memory a weight begins."""
    for tensor in model.parameters():
        tensor.data = tensor.data.clone()
    return tiny.logits(model, IDS)


# --- what loads ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.TINY)
def test_a_folder_loads_as_it_was_saved(tmp_path, name, dtype):
    loaded, saved = load_model(str(tiny.save(tmp_path, name, 3, dtype))), tiny.model(name, 3, dtype)
    assert loaded.model.state_dict().keys() == saved.state_dict().keys() and loaded.dtype == dtype
    assert tiny.snapshot(loaded.model)["state"] == tiny.snapshot(saved)["state"]
    assert loaded.digest == model_digest(saved) and torch.equal(answers(loaded.model), answers(saved))
    assert loaded.layout == layout_of_model(saved) and not loaded.model.training
    assert (loaded.name, loaded.folder) == (str(tmp_path), tmp_path.resolve())


def test_the_tokenizer_is_the_one_beside_the_model(whole):
    assert load_model(str(whole)).tokenizer("w3 w9")["input_ids"] == [3, 9]


def test_the_embedded_model_needs_no_network(monkeypatch):
    monkeypatch.setattr(module, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    loaded = load_model("ref-a")
    assert loaded.layout.units.tolist() == [5, 448] * 12 and loaded.layout.total == 4_161_440
    assert loaded.dtype == torch.bfloat16


def test_shards_load_as_one_file(folder, whole):
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    place = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for part in set(place.values()):
        save_file({name: weights[name] for name in names if place[name] == part}, folder / part, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    assert torch.equal(tiny.logits(load_model(str(folder)).model, IDS), tiny.logits(load_model(str(whole)).model, IDS))
    (folder / "part-1.safetensors").unlink()
    with refuses(DamagedError):
        load_model(str(folder))


# --- names ---


def test_names_become_folders(whole, monkeypatch, tmp_path):
    assert resolve("ref-a").name == "ref-a" and resolve(str(whole)) == whole.resolve()
    monkeypatch.setenv("HOME", str(whole.parent))
    assert resolve(f"~/{whole.name}") == whole.resolve()
    monkeypatch.chdir(whole.parent)
    assert resolve(whole.name) == whole.resolve()


@pytest.mark.parametrize(
    "name",
    ["/none/at/all", "./none", "../none", "~nobody-of-that-name/x", "a/b/c", "a b", "a\nb", "a\0b", "x" * 5000, "-", "a/../b"],
)
def test_a_name_of_nothing_is_refused(name):
    with refuses(InputError):
        load_model(name)


def test_a_name_that_may_not_be_looked_at_is_said(monkeypatch):
    def denied(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "is_dir", denied)
    with refuses(ResourceError):
        resolve("/theirs/model")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with refuses(InputError):
        load_model(str(tmp_path / "model.safetensors"))


# --- nothing is run ---


@pytest.mark.parametrize("field", ["config.json", "tokenizer_config.json"])
def test_code_in_a_folder_never_runs(folder, monkeypatch, field):
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    record = json.loads((folder / field).read_text())
    classes = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (folder / field).write_text(json.dumps(record | {"auto_map": classes, "tokenizer_class": "Evil"}))
    try:
        load_model(str(folder))
    except PPFError as error:
        assert "\n" not in str(error)
    assert not ran.exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth"])
def test_pickles_are_never_opened(folder, name):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (folder / "ran",))

    (folder / "model.safetensors").unlink()
    with refuses(DamagedError):
        load_model(str(folder))
    (folder / name).write_bytes(pickle.dumps(Evil()))
    with refuses(UnsupportedError):
        load_model(str(folder))
    (folder / "model.safetensors").write_bytes(pickle.dumps(Evil()))
    with refuses(DamagedError):
        load_model(str(folder))
    assert not (folder / "ran").exists()


# --- the digest ---


def test_the_digest_tells_models_apart():
    models = [
        *(tiny.model(seed=seed) for seed in range(3)),
        tiny.model("llama-mha"),
        tiny.model("qwen2-gqa"),
        tiny.model("qwen3-gqa"),
    ]
    assert len({model_digest(model) for model in models}) == len(models)
    assert model_digest(tiny.model()) == model_digest(tiny.model())


@pytest.mark.parametrize("place", [0, -1])
def test_one_changed_weight_changes_the_digest(place):
    model = tiny.model()
    before = model_digest(model)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            old = parameter.view(-1)[place].clone()
            parameter.view(-1)[place] += 0.5
            assert model_digest(model) != before, name
            parameter.view(-1)[place] = old
    assert model_digest(model) == before


@pytest.mark.parametrize("name", ["llama-wide-heads-rope", "mistral-gqa", "qwen2-mha-tied-window", "qwen3-gqa"])
def test_the_digest_is_that_of_the_folder_and_of_the_model_in_memory(tmp_path, name):
    model = tiny.model(name)
    layout = layout_of_model(model)
    for folder, one in (("dense", model), ("cut", cut(model, layout, random_mask(layout)))):
        one.save_pretrained(tmp_path / folder)
        for attention in ("sdpa", "eager"):
            again = AutoModelForCausalLM.from_pretrained(tmp_path / folder, attn_implementation=attention)
            assert model_digest(again) == model_digest(one)


@pytest.mark.parametrize("name", ["llama-mha", "qwen3-gqa"])
@pytest.mark.parametrize("pruned", [False, True])
def test_a_field_that_a_later_transformers_adds_does_not_change_the_digest(monkeypatch, name, pruned):
    model = tiny.model(name)
    layout = layout_of_model(model)
    model = cut(model, layout, random_mask(layout)) if pruned else model
    before, to_dict = model_digest(model), PreTrainedConfig.to_dict
    monkeypatch.setattr(PreTrainedConfig, "to_dict", lambda self: to_dict(self) | {"new_field": getattr(self, "new_field", 7)})
    assert model_digest(model) == before
    model.config.new_field = 8
    assert model_digest(model) != before


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}, {"sliding_window": 5}])
def test_a_changed_setting_changes_the_digest(change):
    model = tiny.model("mistral-gqa")
    before = model_digest(model)
    for name, value in change.items():
        setattr(model.config, name, value)
    assert model_digest(model) != before


# --- models given as objects ---


def test_a_given_model_is_known_as_one_that_was_loaded(whole):
    loaded = load_model(str(whole))
    model = tiny.model()
    adopted = adopt_model(model, tiny.tokenizer())
    assert type(adopted.model) is type(model) and adopted.folder is None
    assert (adopted.layout, adopted.digest, adopted.dtype) == (loaded.layout, loaded.digest, loaded.dtype)


@pytest.mark.parametrize("mode", [True, False, "some"])
def test_a_given_model_shares_its_weights_and_nothing_else(mode):
    model = tiny.model().train(bool(mode))
    if mode == "some":
        model.model.layers[1].eval()
    before = tiny.snapshot(model)
    adopted = adopt_model(model, tiny.tokenizer()).model
    assert not any(module.training for module in adopted.modules())
    adopted.register_forward_pre_hook(lambda *_: None)
    adopted.config.use_cache = not model.config.use_cache
    assert tiny.snapshot(model) == before
    for ours, theirs in ((adopted.parameters(), model.parameters()), (adopted.buffers(), model.buffers())):
        assert all(a is b for a, b in zip(ours, theirs, strict=True))
    assert adopted.get_input_embeddings().weight is adopted.get_output_embeddings().weight
    assert torch.equal(tiny.logits(adopted, IDS), tiny.logits(model, IDS))


def test_its_tokenizer_is_found_where_it_came_from(whole):
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert adopt_model(model).tokenizer("w7")["input_ids"] == [7]
    with refuses(InputError):
        adopt_model(tiny.model())
    model.config._name_or_path = "x" * 5000
    with refuses(ResourceError):
        adopt_model(model)


def test_only_a_causal_lm_of_a_known_family_is_taken():
    for kind in (LlamaModel, LlamaForSequenceClassification):
        with refuses(UnsupportedError):
            adopt_model(kind(tiny.TINY["llama-mha"]()), tiny.tokenizer())


# --- precision ---


@pytest.mark.parametrize("name", tiny.TINY)
def test_converting_gives_what_loading_in_that_precision_gives(tmp_path, name):
    folder = tiny.save(tmp_path, name)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        converted = convert(tiny.model(name), torch.device("cpu"), dtype)
        loaded = separate_experts(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
        assert converted.dtype == dtype
        assert tiny.snapshot(converted)["state"] == tiny.snapshot(loaded)["state"]
        assert torch.equal(answers(converted), answers(loaded))
        tied = converted.get_input_embeddings().weight is converted.get_output_embeddings().weight
        assert tied is bool(converted.config.tie_word_embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_model_is_never_converted_itself(dtype):
    model = tiny.model(dtype=torch.bfloat16)
    loaded, before = adopt_model(model, tiny.tokenizer()), tiny.snapshot(model)
    other = loaded.on(Placement(torch.device("cpu")), dtype)
    assert other.dtype == dtype and tiny.snapshot(model) == before
    assert (other is loaded.model) is (dtype == torch.bfloat16)


def test_a_loaded_model_is_converted_only_where_nothing_is_lost(tmp_path):
    loaded, cpu = load_model(str(tiny.save(tmp_path, dtype=torch.bfloat16))), torch.device("cpu")
    before = copy.deepcopy(tiny.snapshot(loaded.model)["state"])
    assert loaded.on(Placement(cpu), torch.float16) is not loaded.model
    assert tiny.snapshot(loaded.model)["state"] == before
    assert loaded.on(Placement(cpu), torch.float32) is loaded.model
    assert tiny.snapshot(loaded.on(Placement(cpu), torch.bfloat16))["state"] == before


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa-tied", "gemma2-gqa", "mixtral-gqa"])
def test_a_model_that_rests_has_the_weights_of_its_files_and_can_be_converted_again(tmp_path, name):
    loaded, cpu = load_model(str(tiny.save(tmp_path, name, dtype=torch.bfloat16))), Placement(torch.device("cpu"))
    before = tiny.snapshot(loaded.model)
    first = tiny.snapshot(loaded.on(cpu, torch.float32))
    assert loaded.model.dtype == torch.float32
    loaded.rest()
    assert tiny.snapshot(loaded.model) == before
    assert tiny.snapshot(loaded.on(cpu, torch.float32)) == first


@pytest.mark.parametrize("name", ["llama-mha", "mixtral-gqa"])
def test_what_was_converted_is_let_go_before_the_files_are_read(tmp_path, monkeypatch, name):
    loaded, read = load_model(str(tiny.save(tmp_path, name, dtype=torch.bfloat16))), load._read_weights
    loaded.on(Placement(torch.device("cpu")), torch.float32)
    held = []

    def reading(*arguments):
        held.append(sum(weight.untyped_storage().nbytes() for weight in loaded.model.parameters()))
        return read(*arguments)

    monkeypatch.setattr(load, "_read_weights", reading)
    loaded.rest()
    assert held == [0]


def test_a_model_never_takes_the_weights_of_other_files(tmp_path):
    loaded = load_model(str(tiny.save(tmp_path / "model", dtype=torch.bfloat16)))
    before = tiny.snapshot(loaded.on(Placement(torch.device("cpu")), torch.float32))
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "down_proj" in name)
    path.unlink()  # those who have it mapped keep it
    save_file({**tensors, name: tensors[name] + 1}, path, {"format": "pt"})
    with refuses(DamagedError):
        loaded.rest()
    assert tiny.snapshot(loaded.model) == before


def test_a_model_without_its_files_rests_as_it_is(tmp_path):
    loaded, cpu = load_model(str(tiny.save(tmp_path / "model", dtype=torch.bfloat16))), Placement(torch.device("cpu"))
    first = tiny.snapshot(loaded.on(cpu, torch.float32))
    shutil.rmtree(tmp_path / "model")
    loaded.rest()
    given = adopt_model(tiny.model(), tiny.tokenizer())
    given.rest()
    assert tiny.snapshot(loaded.model) == first and tiny.snapshot(given.model) == tiny.snapshot(tiny.model())


QUIET = """
from transformers.utils import logging
import ppf.llm.engines.local, ppf.llm.load
before = logging.get_verbosity(), logging.is_progress_bar_enabled()
ppf.llm.load.quiet_transformers()
print(before == (logging.WARNING, True), logging.get_verbosity() == logging.ERROR, logging.is_progress_bar_enabled())
"""


def test_transformers_is_silenced_only_on_demand():
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRANSFORMERS_", "HF_"))}
    done = subprocess.run([sys.executable, "-W", "error", "-c", QUIET], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr
