import numpy as np
import pytest

import gguf_builders as builders
import tiny_models
from builders import refuses
from ppf.errors import UnsupportedError
from ppf.llm.gguf_archs import ARCHS
from ppf.llm.gguf_rope import context_of, divisors, query_scale, rope_of, window_keys

LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [4.0, 5.0, 6.0, 7.0],
    "original_max_position_embeddings": 32,
}  # fmt: skip


def test_plain_frequencies_need_no_divisors():
    plain = 500.0 ** (-np.arange(0, 8, 2) / 8)
    assert divisors(500.0, plain, 8) is None
    assert divisors(500.0, plain / 2, 8) == pytest.approx(np.full(4, 2.0))


def test_elements_that_are_not_turned_get_an_angle_of_zero():
    base, found, _ = rope_of(tiny_models.model("phi3-mha-partial-window"))
    factors = divisors(base, found, 8)
    assert len(found) == 2 and base ** (-np.arange(0, 8, 2) / 8)[:2] / factors[:2] == pytest.approx(found)
    assert (131072 / factors[2:] < 1e-9).all() and np.isfinite(np.square(factors)).all()


def test_frequencies_that_grow_with_the_text_are_held_as_they_are_for_short_ones():
    made = builders.model("phi3-gqa", rope_parameters=LONG, original_max_position_embeddings=32)
    tiny_models.logits(made, tiny_models.blocks(1, 40))  # a long text leaves its own frequencies behind
    base, found, scale = rope_of(made)
    assert divisors(base, found, 8) == pytest.approx(np.array(LONG["short_factor"]))
    assert scale == pytest.approx(1 + np.log(2) / np.log(32))  # 64 tokens are twice 32; queries carry what keys would
    context, notes = context_of(made, ARCHS["deci"])
    assert context == 32 and "short texts" in notes[0]


def test_windows_need_plain_frequencies():
    rules = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    made = builders.model("gemma3_text-gqa", rope_parameters={**rules, "sliding_attention": linear})
    with refuses(UnsupportedError) as caught:
        rope_of(made)
    assert "window" in str(caught.value)


def test_a_window_is_a_key_where_llama_cpp_has_it_and_bounds_the_context_elsewhere():
    made = tiny_models.model("gemma2-gqa")
    assert window_keys(made, ARCHS["gemma2"]) == {
        "attention.sliding_window": 6, "attention.sliding_window_pattern": [True, False, True],
    }  # fmt: skip
    assert context_of(made, ARCHS["gemma2"]) == (64, ())
    assert window_keys(made, ARCHS["qwen2"]) == {} and context_of(made, ARCHS["qwen2"])[0] == 6


def test_at_27_billion_parameters_llama_cpp_scales_a_gemma_by_its_stream():
    made = builders.model(
        "gemma2-gqa", num_hidden_layers=46, layer_types=["full_attention"] * 46, hidden_size=8, intermediate_size=4
    )
    assert query_scale(made, "gemma2", 16, 4) == pytest.approx(24**-0.5 / 2**-0.5)
    assert query_scale(made, "gemma3", 16, 4) == pytest.approx(24**-0.5 / 16**-0.5)
