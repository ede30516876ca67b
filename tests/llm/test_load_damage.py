import json
import shutil
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny_models as tiny
from builders import examples, refuses
from ppf.errors import DamagedError, InputError, PPFError, UnsupportedError
from ppf.llm import load
from ppf.llm.architectures import FAMILIES, skeleton
from ppf.llm.load import load_model, read_config
from ppf.llm.weights import check_weights


def set_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not ...}))


def set_weights(folder, change):
    """Rewrites the weights; ``change`` gets them by name."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def set_header(folder, change):
    """Rewrites the JSON header of the weights; ``change`` gets it and may return another."""
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    text = json.dumps(change(header) or header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def split(folder, index):
    """The weights in one shard, with an index over it."""
    (folder / "model.safetensors").rename(folder / "shard.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)


def no_weights_read(monkeypatch):
    """Makes any reading of weights fail the test."""
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    monkeypatch.setattr(load, "check_weights", lambda *_: pytest.fail("weights were looked at"))


# --- configs ---


@pytest.mark.parametrize("weights", ["absent", "garbage"])
@pytest.mark.parametrize("kind", ["gpt2", "bert", "llama4", "", None, ["llama"], {"a": 1}, "evil\nname"])
def test_an_unknown_family_is_refused_before_weights_are_looked_at(folder, monkeypatch, kind, weights):
    set_config(folder, model_type=kind)
    (folder / "model.safetensors").unlink()
    if weights == "garbage":
        (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    no_weights_read(monkeypatch)
    with refuses(UnsupportedError) as caught:
        load_model(str(folder))
    assert all(family in str(caught.value) for family in FAMILIES)


def test_a_folder_without_config_is_no_model(folder):
    (folder / "config.json").unlink()
    with refuses(InputError):
        load_model(str(folder))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"5",
        b"null",
        b'"llama"',
        b'{"model": 1}',
        b"[" * 100_000,
        b'{"model_type": ' + b"1" * 5000 + b"}",
        b"\xff\xfe{",
    ],
)
def test_a_config_that_is_no_json_object_of_a_model_is_refused(folder, text):
    (folder / "config.json").write_bytes(text)
    with refuses(DamagedError):
        load_model(str(folder))


HOSTILE = [
    {"hidden_size": "x"}, {"hidden_size": None}, {"hidden_size": float("nan")}, {"hidden_size": -32}, {"hidden_size": 10**30},
    {"hidden_size": 64}, {"num_hidden_layers": 0}, {"num_hidden_layers": -1}, {"num_hidden_layers": 2}, {"num_hidden_layers": 4},
    {"num_hidden_layers": 10**9}, {"num_attention_heads": 0}, {"num_key_value_heads": 0}, {"num_key_value_heads": 3},
    {"num_key_value_heads": 4}, {"head_dim": 10**12}, {"intermediate_size": 41}, {"vocab_size": None}, {"vocab_size": 95},
    {"vocab_size": 2**63}, {"hidden_act": "unheard of"}, {"pad_token_id": 10**6}, {"dtype": "pickle"}, {"dtype": 5},
    {"rope_parameters": [1]}, {"rope_parameters": {"rope_type": "new"}}, {"rope_parameters": {"rope_type": "yarn", "factor": "x"}},
    {"per_layer_config": 5}, {"per_layer_config": {"x": 5}}, {"per_layer_config": {"99": {"intermediate_size": 5}}},
    {"per_layer_config": {"0": {"intermediate_size": 5}}}, {"tie_word_embeddings": False}, {"attention_bias": True},
    {"_attn_implementation": "unheard of"}, {"deep": json.loads("[" * 900 + "]" * 900)},
]  # fmt: skip


@pytest.mark.parametrize("changes", HOSTILE, ids=lambda changes: json.dumps(changes)[:50])
def test_a_config_that_does_not_fit_its_weights_is_refused(folder, monkeypatch, changes):
    set_config(folder, **changes)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises((DamagedError, UnsupportedError)) as caught:
        load_model(str(folder))
    with refuses(type(caught.value)):
        raise caught.value


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "unheard of"])
def test_quantised_models_are_refused(folder, method):
    set_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with refuses(UnsupportedError):
        load_model(str(folder))


# --- tokenizers ---


def test_a_tokenizer_that_is_too_large_is_refused(folder):
    tiny.tokenizer(words=94).save_pretrained(folder)
    with refuses(InputError) as caught:
        load_model(str(folder))
    assert "96" in str(caught.value)
    tiny.tokenizer(words=93).save_pretrained(folder)
    load_model(str(folder))


@pytest.mark.parametrize("damage", ["missing", "broken", "no object", "cut"])
def test_a_folder_without_a_whole_tokenizer_is_refused(folder, damage):
    path = folder / "tokenizer.json"
    if damage == "missing":
        path.unlink()
        (folder / "tokenizer_config.json").unlink()
    else:
        path.write_text({"broken": "{", "no object": "[]", "cut": path.read_text()[:-200]}[damage])
    with refuses(InputError):
        load_model(str(folder))


# --- weights ---


def test_each_missing_extra_or_reshaped_tensor_is_named(folder, whole):
    weights = load_file(whole / "model.safetensors")
    shell = skeleton(read_config(whole))
    for name, tensor in weights.items():
        for changed in ({}, {name: tensor[None]}, {name: torch.cat([tensor, tensor])}, {name: tensor, name + "x": tensor}):
            rest = {other: value for other, value in weights.items() if other != name}
            save_file(rest | {key: value.clone() for key, value in changed.items()}, folder / "model.safetensors")
            with refuses(DamagedError) as caught:
                check_weights(folder, shell)
            assert name in str(caught.value)


@pytest.mark.parametrize("change", ["missing", "reshaped", "extra"])
def test_damaged_weights_are_refused_before_they_are_read(folder, monkeypatch, change):
    name = "model.layers.1.mlp.up_proj.weight"
    changes = {
        "missing": lambda weights: weights.pop(name),
        "reshaped": lambda weights: weights.update({name: weights[name].T.contiguous()}),
        "extra": lambda weights: weights.update({"model.layers.3.mlp.up_proj.weight": torch.ones(40, 32)}),
    }
    set_weights(folder, changes[change])
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("weights were read"))
    with refuses(DamagedError):
        load_model(str(folder))


def test_an_untied_model_needs_its_head(tmp_path):
    tiny.save(tmp_path, "llama-mha")
    set_weights(tmp_path, lambda weights: weights.pop("lm_head.weight"))
    with refuses(DamagedError):
        load_model(str(tmp_path))


def test_a_cut_file_is_refused(folder, whole):
    path, data, shell = folder / "model.safetensors", (whole / "model.safetensors").read_bytes(), skeleton(read_config(whole))
    header = 8 + struct.unpack("<Q", data[:8])[0]
    cuts = [data[:size] for size in (*range(0, header + 1, 97), *np.linspace(header, len(data) - 1, 50, dtype=int))]
    announced = [struct.pack("<Q", size) + data[8:] for size in (0, 1, header, 2**24 + 1, 2**63, 2**64 - 1)]
    for damaged in (*cuts, *announced, data + b"\0", b"\x80\x04" + data):
        path.write_bytes(damaged)
        with refuses(DamagedError):
            check_weights(folder, shell)


def test_a_bloated_header_is_refused_unread(folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    path.write_bytes(struct.pack("<Q", 2**24 + 1) + data[8:end].ljust(2**24 + 1) + data[end:])
    with refuses(DamagedError):
        load_model(str(folder))


def every_entry(**changes):
    def change(header):
        for name, entry in header.items():
            if name != "__metadata__":
                entry.update(changes)

    return change


def first_entry(change):
    def changed(header):
        change(header[next(name for name in header if name != "__metadata__")])

    return changed


HEADERS = {
    "a list": lambda header: [header],
    "a number": lambda header: 5,
    "entries that are numbers": lambda header: dict.fromkeys(header, 5),
    "metadata that is a number": lambda header: header.update(__metadata__=5),
    "offsets of text": every_entry(data_offsets=["a", "b"]),
    "offsets of digits": every_entry(data_offsets=["0", "9" * 5000]),
    "no offsets": every_entry(data_offsets=None),
    "one offset": every_entry(data_offsets=[0]),
    "endless offsets": every_entry(data_offsets=[0, float("inf")]),
    "offsets that are no numbers": every_entry(data_offsets=[0, float("nan")]),
    "offsets that overlap": first_entry(lambda entry: entry.update(data_offsets=[0, 8])),
    "negative offsets": first_entry(lambda entry: entry.update(data_offsets=[-8, -4])),
    "no shape": first_entry(lambda entry: entry.pop("shape")),
    "a shape of text": first_entry(lambda entry: entry.update(shape=["x"])),
    "no dtype": first_entry(lambda entry: entry.pop("dtype")),
    "a dtype that is a list": first_entry(lambda entry: entry.update(dtype=["F32"])),
    "another width": first_entry(lambda entry: entry.update(dtype="F16")),
}


@pytest.mark.parametrize("change", HEADERS)
def test_a_hostile_header_is_refused(folder, change):
    set_header(folder, HEADERS[change])
    with refuses(DamagedError):
        load_model(str(folder))


@pytest.mark.parametrize("dtype", ["I32", "U8", "F8_E4M3", "Q9"])
def test_weights_that_are_no_floating_point_numbers_are_refused(folder, dtype):
    set_header(folder, first_entry(lambda entry: entry.update(dtype=dtype)))
    with refuses(UnsupportedError):
        load_model(str(folder))


@examples(60)
@given(st.data())
def test_no_change_of_the_header_raises_a_foreign_error(whole, tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed"
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    content = bytearray((whole / "model.safetensors").read_bytes())
    end = 8 + struct.unpack("<Q", content[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    (folder / "model.safetensors").write_bytes(content)
    try:
        load_model(str(folder))
    except PPFError as error:
        assert "\n" not in str(error)


def test_what_the_reader_of_weights_finds_is_translated(folder, monkeypatch):
    def reader(*_, **__):
        raise SafetensorError("invalid\nheader")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", reader)
    with refuses(DamagedError):
        load_model(str(folder))


def test_a_weight_that_the_reader_left_out_is_named(folder, monkeypatch):
    report = {"missing_keys": {"b.weight", "a.weight"}}
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (tiny.model(), report))
    with refuses(DamagedError) as caught:
        load_model(str(folder))
    assert "a.weight" in str(caught.value)


INDEXES = [
    "", "{", "[]", "5", "{}", '{"weight_map": 5}', '{"weight_map": ["a"]}', '{"weight_map": {}}', "[" * 100_000,
    *({"weight_map": {"a": name}} for name in (None, 5, ["x"], "..", "../shard.safetensors", "/etc/passwd", "a\0b", "x" * 5000)),
    *({"weight_map": {"a": name, "b": "shard.safetensors"}} for name in (5, "none.safetensors", "tokenizer.json")),
]  # fmt: skip


@pytest.mark.parametrize("index", INDEXES, ids=lambda index: str(index)[:40])
def test_a_hostile_index_is_refused(folder, index):
    split(folder, index)
    with refuses(DamagedError):
        load_model(str(folder))


def test_damaged_generation_settings_are_refused(folder):
    (folder / "generation_config.json").write_text("[]")
    with refuses(DamagedError):
        load_model(str(folder))


def test_tied_embeddings_may_be_written_once_or_twice(folder):
    set_weights(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    load_model(str(folder))
    set_weights(folder, lambda weights: weights.pop("model.embed_tokens.weight"))
    with refuses(DamagedError):
        load_model(str(folder))


def test_old_rotary_buffers_are_no_weights(folder):
    set_weights(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    load_model(str(folder))
