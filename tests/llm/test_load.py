import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import errors as hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, LlamaModel

import tiny_models as tiny
from builders import refuses
from ppf.errors import DamagedError, InputError, PPFError, ResourceError, UnsupportedError
from ppf.llm import load
from ppf.llm.architectures import layout_of_model
from ppf.llm.load import adopt_model, convert, load_model, model_digest, resolve

IDS = tiny.blocks(2, 9)
REPLY = SimpleNamespace(headers={}, request=None)


# --- what loads ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", tiny.TINY)
def test_a_folder_loads_as_it_was_saved(tmp_path, name, dtype):
    loaded, saved = load_model(str(tiny.save(tmp_path, name, 3, dtype))), tiny.model(name, 3, dtype)
    assert loaded.model.state_dict().keys() == saved.state_dict().keys() and loaded.dtype == dtype
    assert tiny.snapshot(loaded.model)["state"] == tiny.snapshot(saved)["state"]
    assert torch.equal(tiny.logits(loaded.model, IDS), tiny.logits(saved, IDS))
    assert loaded.layout == layout_of_model(saved) and not loaded.model.training
    assert (loaded.name, loaded.folder, loaded.digest) == (str(tmp_path), tmp_path.resolve(), model_digest(saved))


def test_the_tokenizer_is_the_one_beside_the_model(whole):
    assert load_model(str(whole)).tokenizer("w3 w9")["input_ids"] == [3, 9]


def test_the_embedded_model_needs_no_network(monkeypatch):
    monkeypatch.setattr(load, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
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


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with refuses(InputError):
        load_model(str(tmp_path / "model.safetensors"))


def test_a_hub_id_is_fetched_without_code_or_pickles(whole, monkeypatch):
    asked = []
    monkeypatch.setattr(load, "snapshot_download", lambda *args, **options: asked.append((args, options)) or str(whole))
    assert load_model("someone/model").folder == whole
    [(args, options)] = asked
    assert args == ("someone/model",)
    wanted = [pattern.rpartition(".")[2] for pattern in options["allow_patterns"]]
    assert set(wanted) == {"json", "safetensors", "model", "jinja"}


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (hub.HFValidationError("Repo id must be\nshorter"), InputError),
        (hub.RepositoryNotFoundError("404\nnot found", response=REPLY), InputError),
        (hub.GatedRepoError("403\nlog in first", response=REPLY), ResourceError),
        (hub.LocalEntryNotFoundError("offline\nand not cached"), ResourceError),
        (hub.HfHubHTTPError("500\nserver error", response=REPLY), ResourceError),
        (ConnectionError("no route\nto host"), ResourceError),
        (Exception("read\ntimed out"), ResourceError),
        (OSError(28, "No space left on device"), ResourceError),
    ],
)
def test_what_the_hub_answers_is_translated(monkeypatch, failure, kind):
    def download(*_, **__):
        raise failure

    monkeypatch.setattr(load, "snapshot_download", download)
    with refuses(kind) as caught:
        load_model("someone/model")
    assert "someone/model" in str(caught.value)


def test_being_offline_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with refuses(ResourceError):
        load_model("no-such-owner/no-such-model")


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


# --- models given as objects ---


def test_a_given_model_is_known_as_one_that_was_loaded(whole):
    loaded = load_model(str(whole))
    model = tiny.model()
    adopted = adopt_model(model, tiny.tokenizer())
    assert adopted.model is model and adopted.folder is None
    assert (adopted.layout, adopted.digest, adopted.dtype) == (loaded.layout, loaded.digest, loaded.dtype)


def test_a_given_model_is_only_put_into_evaluation_mode():
    model = tiny.model()
    before = tiny.snapshot(model)
    assert not adopt_model(model.train(), tiny.tokenizer()).model.training
    assert tiny.snapshot(model) == before


def test_its_tokenizer_is_found_where_it_came_from(whole):
    model = AutoModelForCausalLM.from_pretrained(whole)
    assert adopt_model(model).tokenizer("w7")["input_ids"] == [7]
    with refuses(InputError):
        adopt_model(tiny.model())


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
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        assert converted.dtype == dtype
        assert tiny.snapshot(converted)["state"] == tiny.snapshot(loaded)["state"]
        assert torch.equal(tiny.logits(converted, IDS), tiny.logits(loaded, IDS))
        tied = converted.get_input_embeddings().weight is converted.get_output_embeddings().weight
        assert tied is bool(converted.config.tie_word_embeddings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_given_model_is_never_converted_itself(dtype):
    model = tiny.model(dtype=torch.bfloat16)
    loaded, before = adopt_model(model, tiny.tokenizer()), tiny.snapshot(model)
    other = loaded.on(torch.device("cpu"), dtype)
    assert other.dtype == dtype and tiny.snapshot(model) == before
    assert (other is model) is (dtype == torch.bfloat16)


def test_a_loaded_model_is_converted_only_where_nothing_is_lost(tmp_path):
    loaded, cpu = load_model(str(tiny.save(tmp_path, dtype=torch.bfloat16))), torch.device("cpu")
    before = copy.deepcopy(tiny.snapshot(loaded.model)["state"])
    assert loaded.on(cpu, torch.float16) is not loaded.model
    assert tiny.snapshot(loaded.model)["state"] == before
    assert loaded.on(cpu, torch.float32) is loaded.model
    assert tiny.snapshot(loaded.on(cpu, torch.bfloat16))["state"] == before
