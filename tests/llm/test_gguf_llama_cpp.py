"""What llama.cpp makes of the files; the marker is `llamacpp`, and pip install 'ppf[llamacpp]' brings it."""

import numpy as np
import pytest

import gguf_builders as builders
import tiny_models
from builders import importance, names_in, refuses
from ppf.errors import DamagedError
from ppf.llm import gguf_check, gguf_tensors
from ppf.llm.architectures import layout_of_model
from ppf.llm.compensation import Fill
from ppf.llm.depth import with_depth
from ppf.llm.gguf import FILE_TYPES, write_gguf
from ppf.llm.gguf_archs import ARCHITECTURES, ARCHS
from ppf.llm.gguf_check import in_llama_cpp
from ppf.llm.gguf_tokenizer import PRE_TOKENIZERS
from ppf.llm.surgery import cut
from ppf.space.allocation import Allocation
from ppf.space.mask import select

pytestmark = pytest.mark.llamacpp
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
STEEP = {"rope_type": "default", "rope_theta": 500.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 32,
}  # fmt: skip
BY_KIND = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
}


def difference(model, path, quant="f32", tokenizer=None):
    found = write_gguf(model, tokenizer or tiny_models.tokenizer(), path, quant, "tiny", force=True)
    assert found.check.difference is not None and "loaded in llama.cpp" in str(found.check)
    assert found.check.log_ppl is not None and abs(np.diff(found.check.log_ppl)[0]) <= found.check.bound
    return found.check.difference, found


CASES = [
    (name, kind)
    for name in builders.HELD
    for kind in tiny_models.MASKS
    if name in tiny_models.LLAMA_LIKE or kind in ("nothing", "random", "uniform", "floors")
]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_llama_cpp_answers_as_the_model_does(name, kind, tmp_path):
    dense = tiny_models.model(name)
    layout = layout_of_model(dense)
    smaller = cut(dense, layout, tiny_models.MASKS[kind](layout))
    assert difference(smaller, tmp_path / "a.gguf")[0] < bound(name)


LAYERS_STAY = ("smollm3-fourth-layer-plain", "qwen2_moe-experts-everywhere")
"""Without a layer, others than each fourth have no rotary embedding, or one keeps a shared expert alone; llama.cpp has neither."""
GONE = [(name, kind) for name in builders.HELD for kind in ("layer", "attention") if kind != "layer" or name not in LAYERS_STAY]
GONE += [("gemma2-gqa", kind) for kind in ("ffn", "first", "all")]


@pytest.mark.parametrize(("name", "kind"), GONE)
def test_llama_cpp_answers_as_the_model_without_sublayers_does(name, kind, tmp_path):
    dense = tiny_models.model(name)
    layout = with_depth(dense, layout_of_model(dense))
    smaller = cut(dense, layout, tiny_models.DEPTH_MASKS[kind](layout))
    assert difference(smaller, tmp_path / "a.gguf")[0] < bound(name)


@pytest.mark.parametrize("case", ["one", "one left"])
@pytest.mark.parametrize("name", ["mixtral-gqa", "qwen2_moe-experts-everywhere", "qwen3_moe-experts-everywhere"])
def test_llama_cpp_answers_as_the_model_without_experts_does(name, case, tmp_path):
    dense = tiny_models.model(name)
    layout = with_depth(dense, layout_of_model(dense))
    smaller = cut(dense, layout, tiny_models.EXPERT_MASKS[case](layout))
    for quant in ("f32", "q8_0"):
        found, result = difference(smaller, tmp_path / "a.gguf", quant)
        assert found < (bound(name) if quant == "f32" else result.check.bound)


@pytest.mark.parametrize("gone", [{1}, {2}, {1, 2}, {0, 3}])
@pytest.mark.parametrize("name", ["gemma2-gqa", "gemma3_text-gqa"])
def test_windows_stay_with_their_layers_where_others_are_gone(name, gone, tmp_path):
    """Without a layer the pattern of windows is another, here over a text of five windows."""
    dense = builders.model(name, num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    layout = with_depth(dense, layout_of_model(dense))
    kept = np.array([site.floor if site.layer in gone else site.units for site in layout.sites])
    smaller = cut(dense, layout, select(Allocation(kept), importance(layout), layout))
    assert difference(smaller, tmp_path / "a.gguf")[0] < bound(name)


def bound(name):
    """llama.cpp reads GELU off a table of float16."""
    return 1e-3 if ARCHS[ARCHITECTURES[name.split("-")[0]][0]].gelu else 1e-5


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("phi3-gqa", {"tie_word_embeddings": True}),
        ("phi3-gqa", {"rope_parameters": LONG, "original_max_position_embeddings": 32}),
        ("granite-gqa-biases", {"tie_word_embeddings": True}),
        ("granite-gqa-biases", {"rope_parameters": tiny_models.LLAMA3_ROPE, "embedding_multiplier": 12.0, "logits_scaling": 8.0}),
        ("gemma2-gqa", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
        ("gemma2-gqa", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
        ("gemma3_text-gqa", {"tie_word_embeddings": False, "final_logit_softcapping": 3.0}),
        ("gemma3_text-gqa", {"rope_parameters": BY_KIND}),
        ("gpt_neox-parallel", {"tie_word_embeddings": True}),
        ("gpt_neox-serial-tied", {"tie_word_embeddings": False}),
        ("olmo2-gqa", {"tie_word_embeddings": True, "rms_norm_eps": 1e-2}),
        ("smollm3-fourth-layer-plain", {"tie_word_embeddings": False}),
        ("mixtral-gqa", {"tie_word_embeddings": True, "head_dim": 16}),
        ("qwen2_moe-experts-everywhere", {"tie_word_embeddings": False}),
        ("qwen3_moe-experts-everywhere", {"tie_word_embeddings": True}),
    ],
)
@pytest.mark.parametrize("differing", [False, True])
def test_other_numbers_of_a_family_are_heard(name, fields, differing, tmp_path):
    made = builders.model(name, **fields)
    assert difference(builders.pruned(made) if differing else made, tmp_path / "a.gguf")[0] < bound(name)


@pytest.mark.parametrize("name", ["phi3-gqa", "granite-gqa-biases", "gpt_neox-parallel"])
def test_biases_for_what_was_removed_are_heard_in_other_families(name, tmp_path):
    dense = tiny_models.model(name)
    fill = Fill(tuple(np.random.default_rng(1).normal(size=site.units * site.columns) for site in layout_of_model(dense).sites))
    assert difference(builders.pruned(dense, fill=fill), tmp_path / "a.gguf")[0] < bound(name)


@pytest.mark.parametrize("layers", [46, 62])
def test_a_gemma_of_as_many_layers_as_27_billion_parameters_have_is_scaled_as_its_own(layers, tmp_path):
    name = {46: "gemma2-gqa", 62: "gemma3_text-gqa"}[layers]
    made = builders.model(name, num_hidden_layers=layers, layer_types=["full_attention"] * layers)
    assert difference(made, tmp_path / "a.gguf")[0] < bound(name)


@pytest.mark.parametrize("quant", sorted(FILE_TYPES))
@pytest.mark.parametrize("name", ["phi3-mha-partial-window", "qwen2_moe-experts-everywhere", "gpt_neox-parallel"])
def test_every_type_holds_experts_and_fused_matrices(name, quant, tmp_path):
    found, result = difference(builders.model(name), tmp_path / "a.gguf", quant)
    assert found <= result.check.bound


@pytest.mark.parametrize("kind", tiny_models.DEPTH_MASKS)
@pytest.mark.parametrize("name", ["llama-biases", "qwen2-gqa", "qwen3-gqa", "qwen3-mha-tied"])
def test_llama_cpp_does_without_what_is_gone(name, kind, tmp_path):
    dense = tiny_models.model(name)
    layout = with_depth(dense, layout_of_model(dense))
    smaller = cut(dense, layout, tiny_models.DEPTH_MASKS[kind](layout))
    for quant in ("f32", "q8_0") if kind == "all" else ("f32",):
        found, result = difference(smaller, tmp_path / "a.gguf", quant)
        assert found < (1e-5 if quant == "f32" else result.check.bound)
    padded = name == "qwen3-gqa" and kind != "all"
    without_ffn = kind in ("ffn", "first", "all") and not padded
    assert any("without an FFN" in note for note in result.notes) is without_ffn


@pytest.mark.parametrize("name", ["llama-mha", "llama-biases", "mistral-gqa", "qwen2-gqa"])
def test_biases_for_what_was_removed_are_heard(name, tmp_path):
    dense = tiny_models.model(name)
    layout = layout_of_model(dense)
    fill = Fill(tuple(np.random.default_rng(1).normal(size=site.units * site.columns) for site in layout.sites))
    assert difference(builders.pruned(dense, fill=fill), tmp_path / "a.gguf")[0] < 1e-5
    uniform = cut(dense, layout, tiny_models.MASKS["floors"](layout), fill)
    assert difference(uniform, tmp_path / "b.gguf")[0] < 1e-5


@pytest.mark.parametrize(
    ("name", "rope"),
    [
        ("llama-mha", YARN), ("qwen2-gqa", YARN), ("llama-mha", LINEAR), ("qwen2-gqa", LINEAR), ("qwen3-gqa", LINEAR),
        ("qwen3-mha-tied", LINEAR), ("qwen2-gqa", tiny_models.LLAMA3_ROPE), ("mistral-gqa", tiny_models.LLAMA3_ROPE),
        ("qwen3-mha-tied", STEEP), ("llama-mha", STEEP),
    ],
)  # fmt: skip
@pytest.mark.parametrize("differing", [False, True])
def test_rotary_embeddings_of_other_kinds(name, rope, differing, tmp_path):
    made = builders.model(name, rope_parameters=rope)
    assert difference(builders.pruned(made) if differing else made, tmp_path / "a.gguf")[0] < 1e-5


@pytest.mark.parametrize("quant", sorted(FILE_TYPES))
@pytest.mark.parametrize("name", ["llama-gqa-tied", "qwen2-gqa", "qwen3-mha-tied"])
def test_every_type_loads_at_odd_and_even_widths(name, quant, tmp_path):
    for width in (40, 64):
        smaller = builders.pruned(builders.model(name, intermediate_size=width))
        found, result = difference(smaller, tmp_path / "a.gguf", quant)
        assert found <= result.check.bound


def test_rows_in_the_wrong_order_are_found_out_in_every_type(tmp_path, monkeypatch):
    """The file is then what the program meant to write: only llama.cpp's answers show that it should not have."""
    monkeypatch.setattr(gguf_tensors, "interleaved", lambda rows, *_: rows)
    smaller = builders.pruned(builders.model("llama-mha"))
    for quant in FILE_TYPES:
        with refuses(DamagedError) as caught:
            difference(smaller, tmp_path / "a.gguf", quant)
        assert "logits" in str(caught.value) and names_in(tmp_path) == []
    for quant in ("q4_0", "q4_k_m"):  # rounding could hide it: the same is asked before
        monkeypatch.setitem(gguf_check.LOGIT_BOUNDS, quant, 99)
        with refuses(DamagedError):
            difference(smaller, tmp_path / "a.gguf", quant)


@pytest.mark.parametrize("name", sorted(set(PRE_TOKENIZERS.values())))
def test_text_is_split_into_the_same_tokens(name, tmp_path):
    result = difference(builders.model(intermediate_size=64), tmp_path / "a.gguf", tokenizer=builders.byte_level(name))[1]
    assert result.tokenizer.startswith(f"gpt2 with pre-tokenizer {name}") and result.notes == ()


def test_sentence_piece_splits_as_it_did_and_a_text_that_it_splits_otherwise_is_named(tmp_path):
    even = builders.model(intermediate_size=64)
    assert difference(even, tmp_path / "a.gguf", tokenizer=builders.sentence_piece())[1].notes == ()
    for tokenizer in (builders.sentence_piece(metaspace=True), builders.unigram()):
        # transformers puts no second space before a text that begins with one, llama.cpp does
        notes = difference(even, tmp_path / "b.gguf", tokenizer=tokenizer)[1].notes
        assert len(notes) == 1 and "1 of 4" in notes[0] and "'  two" in notes[0]


def test_a_file_that_ends_the_process_is_an_error_of_ours(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    request = {"file": str(path), "ids": [1], "text": [], "out": str(tmp_path / "o.npz"), "context": 256, "threads": 1}
    with refuses(DamagedError) as caught:
        in_llama_cpp("logits", request)
    assert "stopped with code" in str(caught.value)
    with refuses(DamagedError):
        in_llama_cpp("quantise", {"file": str(path), "out": str(tmp_path / "b.gguf"), "type": 15})
