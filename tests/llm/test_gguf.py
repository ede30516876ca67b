import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import gguf_builders as builders
import tiny_models
from builders import full_disk, interrupted, names_in, refuses
from ppf.errors import DamagedError, InputError, ResourceError, UnsupportedError
from ppf.llm import gguf, gguf_check
from ppf.llm.gguf import FILE_TYPES, write_gguf

ROUNDING = {"f32": 0, "f16": 5e-4, "bf16": 4e-3, "q8_0": 8e-3, "q4_0": 0.11}


def contents(path):
    """Keys and values, and tensors as float32, of a file."""
    reader = GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    arrays = {one.name: dequantize(one.data, one.tensor_type).reshape(shapes[one.name]) for one in reader.tensors}
    return keys, arrays


@pytest.fixture(scope="module")
def smaller():
    return builders.pruned(builders.model("llama-gqa-tied"))


def written(model, path, quant="f32", tokenizer=None, **options):
    return write_gguf(model, tokenizer or builders.byte_level("gpt-2"), path, quant, "tiny", **options)


def test_every_number_that_llama_cpp_would_otherwise_guess_is_written(smaller, tmp_path):
    result = written(smaller, tmp_path / "a.gguf")
    keys, _ = contents(tmp_path / "a.gguf")
    assert result.arch == keys["general.architecture"] == "deci"
    layers = smaller.model.layers
    assert keys["deci.attention.head_count"] == [layer.self_attn.q_proj.out_features // 8 for layer in layers]
    assert keys["deci.attention.head_count_kv"] == [layer.self_attn.k_proj.out_features // 8 for layer in layers]
    assert keys["deci.feed_forward_length"] == [layer.mlp.gate_proj.out_features for layer in layers]
    assert [keys[f"deci.{name}"] for name in ("attention.key_length", "attention.value_length", "rope.dimension_count")] == [8] * 3
    assert (keys["deci.block_count"], keys["deci.vocab_size"], keys["deci.context_length"]) == (3, builders.VOCAB, 64)
    assert keys["deci.rope.freq_base"] == 10000 and keys["deci.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert keys["tokenizer.ggml.pre"] == "gpt-2" and keys["general.name"] == "tiny"


def test_layers_alike_are_one_number(tmp_path):
    written(builders.model("qwen2-gqa"), tmp_path / "a.gguf")
    keys, _ = contents(tmp_path / "a.gguf")
    assert (keys["qwen2.attention.head_count"], keys["qwen2.attention.head_count_kv"], keys["qwen2.feed_forward_length"]) == (
        4,
        2,
        40,
    )


@pytest.mark.parametrize("quant", ROUNDING)
@pytest.mark.parametrize("name", ["llama-biases", "qwen3-mha-tied"])
def test_the_weights_come_back_as_exactly_as_their_type_allows(name, quant, tmp_path):
    smaller = builders.pruned(builders.model(name))
    result = written(smaller, tmp_path / "a.gguf", quant)
    keys, arrays = contents(tmp_path / "a.gguf")
    for at, layer in enumerate(smaller.model.layers):
        weight = layer.mlp.up_proj.weight.detach().numpy()
        assert weight.shape[1] % 32 == 0
        error = np.linalg.norm(arrays[f"blk.{at}.ffn_up.weight"] - weight) / np.linalg.norm(weight)
        assert ROUNDING[quant] / 100 <= error <= ROUNDING[quant]
        norm = layer.input_layernorm.weight.detach().numpy()
        assert (arrays[f"blk.{at}.attn_norm.weight"] == norm).all()
        if name == "llama-biases":
            assert (arrays[f"blk.{at}.attn_output.bias"] == layer.self_attn.o_proj.bias.detach().numpy()).all()
    assert keys["general.file_type"] == FILE_TYPES[quant]
    assert result.bytes == (tmp_path / "a.gguf").stat().st_size and result.quant == quant


def test_matrices_whose_width_blocks_do_not_divide_are_counted(tmp_path):
    aligned = builders.model("llama-mha", intermediate_size=64)
    assert written(aligned, tmp_path / "a.gguf", "q8_0").check.fallbacks == 0
    result = written(builders.model("llama-mha"), tmp_path / "b.gguf", "q8_0")
    assert (result.check.fallbacks, result.check.matrices) == (3, 3 * 7 + 2)  # ffn_down of three layers, 40 wide
    assert written(builders.model("llama-mha"), tmp_path / "c.gguf", "f16").check.fallbacks == 0


def test_smaller_types_make_smaller_files(tmp_path):
    model = builders.model("llama-mha", intermediate_size=64)
    sizes = [written(model, tmp_path / quant, quant).bytes for quant in ("f32", "f16", "q8_0", "q4_0")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_linear_scaling_of_a_qwen3_is_a_key_and_other_scaling_is_a_tensor(tmp_path):
    linear = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    written(builders.model("qwen3-gqa", rope_parameters=linear), tmp_path / "a.gguf")
    keys, arrays = contents(tmp_path / "a.gguf")
    assert (keys["qwen3.rope.scaling.type"], keys["qwen3.rope.scaling.factor"]) == (
        "linear",
        2,
    ) and "rope_freqs.weight" not in arrays
    written(builders.model("llama-wide-heads-rope"), tmp_path / "b.gguf")
    keys, arrays = contents(tmp_path / "b.gguf")
    assert arrays["rope_freqs.weight"][-1] == pytest.approx(8) and "llama.rope.scaling.type" not in keys


def test_the_model_is_not_changed_and_the_same_file_comes_again(smaller, tmp_path):
    before = tiny_models.snapshot(smaller)
    for name in ("a", "b"):
        written(smaller, tmp_path / name, "q4_0")
    assert tiny_models.snapshot(smaller) == before
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_half_precision_checkpoint_is_written_without_loss(tmp_path):
    half = tiny_models.model("llama-mha", dtype=torch.bfloat16)
    written(half, tmp_path / "a.gguf", "bf16", tiny_models.tokenizer())
    _, arrays = contents(tmp_path / "a.gguf")
    assert (arrays["blk.0.ffn_up.weight"] == half.model.layers[0].mlp.up_proj.weight.detach().float().numpy()).all()


def test_without_llama_cpp_the_answer_says_that_only_the_file_was_read(smaller, tmp_path):
    result = written(smaller, tmp_path / "a.gguf")
    assert result.check.difference is None and "read back" in str(result.check) and "not loaded in llama.cpp" in str(result.check)


def test_a_tokenizer_that_llama_cpp_does_not_know_is_left_out_and_said(smaller, tmp_path):
    result = written(smaller, tmp_path / "a.gguf", tokenizer=tiny_models.tokenizer())
    keys, _ = contents(tmp_path / "a.gguf")
    assert keys["tokenizer.ggml.model"] == "no_vocab" and any("token ids only" in note for note in result.notes)


def test_a_byte_level_tokenizer_without_merges_is_left_out_too(smaller, tmp_path):
    backend = Tokenizer(models.BPE({letter: at for at, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result = written(smaller, tmp_path / "a.gguf", tokenizer=PreTrainedTokenizerFast(tokenizer_object=backend))
    assert result.tokenizer == "none" and any("merges" in note for note in result.notes)


def test_a_file_is_replaced_only_by_force(smaller, tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUFold")
    with refuses(InputError):
        written(smaller, path)
    assert path.read_bytes() == b"GGUFold"
    written(smaller, path, force=True)
    assert GGUFReader(path).tensors and names_in(tmp_path) == ["a.gguf"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~0o022


def test_what_is_no_gguf_file_is_never_replaced(smaller, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("weights of another model")
    with refuses(InputError) as caught:
        written(smaller, path, force=True)
    assert "GGUF files alone" in str(caught.value)
    assert path.read_text() == "weights of another model"


def test_a_file_that_came_meanwhile_stays(smaller, tmp_path, monkeypatch):
    original = gguf.check

    def slow(*arguments):
        (tmp_path / "a.gguf").write_text("theirs")
        return original(*arguments)

    monkeypatch.setattr(gguf, "check", slow)
    with refuses(InputError):
        written(smaller, tmp_path / "a.gguf")
    assert names_in(tmp_path) == ["a.gguf"] and (tmp_path / "a.gguf").read_text() == "theirs"


@pytest.mark.parametrize("place", ["", "none/a.gguf", "file/a.gguf"])
def test_a_place_that_is_none_for_a_file_is_refused(smaller, tmp_path, place):
    (tmp_path / "file").write_text("x")
    with refuses(InputError):
        written(smaller, tmp_path / place, force=True)


@pytest.mark.parametrize("fail", [full_disk, interrupted])
def test_a_file_that_is_not_finished_leaves_nothing(smaller, tmp_path, monkeypatch, fail):
    monkeypatch.setattr(gguf, "check", fail)
    with pytest.raises(KeyboardInterrupt if fail is interrupted else ResourceError):
        written(smaller, tmp_path / "a.gguf")
    assert names_in(tmp_path) == []


def test_a_file_that_fails_its_check_leaves_nothing_and_the_old_one_stays(smaller, tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_text("GGUF, old")
    monkeypatch.setattr(gguf, "type_of", lambda name, array, quant: GGMLQuantizationType.F16)  # of norms and biases, too
    with refuses(DamagedError):
        written(smaller, tmp_path / "a.gguf", force=True)
    assert names_in(tmp_path) == ["a.gguf"] and (tmp_path / "a.gguf").read_text() == "GGUF, old"


def test_what_is_not_installed_is_named(smaller, tmp_path, monkeypatch):
    with refuses(ResourceError) as caught:
        written(smaller, tmp_path / "a.gguf", "q4_k_m")
    assert "ppf[llamacpp]" in str(caught.value) and "--quant q4_0" in str(caught.value)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: None)
    with refuses(ResourceError) as caught:
        written(smaller, tmp_path / "a.gguf")
    assert "ppf[gguf]" in str(caught.value) and names_in(tmp_path) == []


def test_a_model_that_no_architecture_holds_is_refused(tmp_path):
    with refuses(UnsupportedError):
        written(tiny_models.model("qwen3-biases"), tmp_path / "a.gguf", tokenizer=tiny_models.tokenizer())
    assert names_in(tmp_path) == []
    assert gguf_check.LOGIT_BOUNDS.keys() == FILE_TYPES.keys()


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
@pytest.mark.parametrize("name", [name for name in builders.HELD if name not in tiny_models.LLAMA_LIKE])
def test_files_of_every_family_are_read_back(name, quant, tmp_path):
    smaller = builders.pruned(tiny_models.model(name))
    result = written(smaller, tmp_path / "a.gguf", quant, tiny_models.tokenizer())
    keys, arrays = contents(tmp_path / "a.gguf")
    assert result.check.difference is None and (result.check.tensors, result.check.keys) == (len(arrays), len(keys) - 3)
    assert keys["general.architecture"] == result.arch and keys[f"{result.arch}.block_count"] == smaller.config.num_hidden_layers
    eps = "layer_norm_epsilon" if name.startswith("gpt_neox") else "layer_norm_rms_epsilon"
    assert keys[f"{result.arch}.attention.{eps}"] > 0
    assert keys[f"{result.arch}.rope.dimension_count"] == (
        4 if name == "gpt_neox-parallel" else keys[f"{result.arch}.attention.key_length"]
    )
