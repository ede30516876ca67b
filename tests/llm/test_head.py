import numpy as np
import pytest
import torch

import tiny_models as tiny
from builders import random_mask
from ppf.llm import head
from ppf.llm.architectures import layout_of_model
from ppf.llm.head import in_parts, logits_of, states_of
from ppf.llm.perplexity import measure, reference_of
from ppf.llm.scores import score_units
from ppf.llm.surgery import cut

BLOCKS = tiny.blocks(5, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.TINY)
def test_logits_are_the_model_s_own(name, dtype):
    """Scaled by Granite, capped by Gemma: whatever a family's forward does behind its head."""
    model = tiny.model(name, dtype=dtype)
    for one in (model, cut(model, of := layout_of_model(model), random_mask(of))):
        with torch.inference_mode():
            found = logits_of(one, states_of(one, BLOCKS))
        assert found.dtype == torch.float32
        expected = tiny.logits(one, BLOCKS)[:, :-1].flatten(0, 1).float()
        atol = 1e-6 if dtype == torch.float32 else 2**-8 * expected.abs().max().item()
        torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ["gemma2-gqa", "gemma3_text-gqa", "granite-gqa-biases"])
def test_what_stands_behind_the_head_is_done(name):
    """At numbers at which leaving it out would be seen."""
    model = tiny.model(name)
    setattr(model.config, "logits_scaling" if "granite" in name else "final_logit_softcapping", 0.5)
    with torch.inference_mode():
        states = states_of(model, BLOCKS)
        plain, found = model.get_output_embeddings()(states), logits_of(model, states)
    torch.testing.assert_close(found, tiny.logits(model, BLOCKS)[:, :-1].flatten(0, 1), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(plain, found, atol=0.1)


@pytest.mark.parametrize("tokens", [1, 3, 11, 12, 1000])
def test_how_many_tokens_go_at_once_does_not_matter(monkeypatch, tokens):
    model = tiny.model("gemma2-gqa")
    of = layout_of_model(model)
    smaller, reference = cut(model, of, random_mask(of)), reference_of(model, BLOCKS)
    expected, taylor = measure(smaller, BLOCKS, reference), score_units(model, of, BLOCKS, "taylor", "", 0)
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", tokens * tiny.VOCAB)
    sizes = []
    monkeypatch.setattr(torch.Tensor, "log_softmax", _noted(sizes))
    other = reference_of(model, BLOCKS)
    np.testing.assert_allclose(measure(smaller, BLOCKS, other), expected, rtol=0, atol=1e-6)
    assert max(sizes) == min(tokens, BLOCKS[:, 1:].size) and sum(sizes) == 2 * BLOCKS[:, 1:].size
    for ours, theirs in zip(score_units(model, of, BLOCKS, "taylor", "", 0).scores, taylor.scores, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def _noted(sizes):
    own = torch.Tensor.log_softmax

    def log_softmax(self, *arguments):
        sizes.append(len(self))
        return own(self, *arguments)

    return log_softmax


def test_parts_are_all_and_none_is_too_large(monkeypatch):
    model, states = tiny.model(), torch.arange(100.0)[:, None]
    for most in (1, tiny.VOCAB, 7 * tiny.VOCAB + 1, 10**9):
        monkeypatch.setattr(head, "LOGITS_AT_ONCE", most)
        parts = list(in_parts(model, states))
        assert torch.equal(torch.cat(parts), states) and max(map(len, parts)) == min(100, max(1, most // tiny.VOCAB))
