import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import tiny_models as tiny
from builders import random_mask
from ppf.llm.architectures import layout_of, layout_of_model, linear
from ppf.llm.masking import masked
from ppf.llm.pruned_model import PRUNED
from ppf.llm.surgery import cut
from ppf.space.mask import Mask

IDS = tiny.blocks(2, 14)
contract = pytest.mark.parametrize(("name", "case"), tiny.CONTRACT)


def made(name, case, **options):
    model = tiny.model(name, **options)
    layout = layout_of_model(model)
    mask = tiny.MASKS[case](layout)
    return model, layout, mask, cut(model, layout, mask)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def greedy(model, ids, **options):
    """Six greedy tokens behind each prompt."""
    settings = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=2, eos_token_id=2)
    return model.generate(input_ids=torch.from_numpy(ids), generation_config=settings, **options)[:, ids.shape[1] :].tolist()


# --- the contract of every family and allocation ---


@contract
def test_parameters_are_exactly_those_of_the_layout(name, case):
    model, layout, mask, smaller = made(name, case)
    kept = mask.allocation.kept
    assert count(smaller) == layout.kept_params(kept)
    assert count(model) - count(smaller) == (layout.units - kept) @ layout.costs
    for site, units in zip(layout.sites, kept, strict=True):
        for module in {rows.module for rows in site.writers}:
            width = sum(rows.width for rows in site.writers if rows.module == module)
            assert linear(smaller, module).out_features == width * units
        assert linear(smaller, site.reader).weight.shape[1] == linear(smaller, site.reader).in_features == site.columns * units
        for field, each in site.shapes:
            said = getattr(smaller.config.per_layer_config[site.layer], field)
            assert (said[int(site.kind.removeprefix("expert"))] if site.role == "expert" else said) == each * units


@contract
def test_the_cut_model_answers_as_the_masked_one(name, case):
    model, layout, mask, smaller = made(name, case)
    with masked(model, layout, mask):
        expected = tiny.logits(model, IDS)
    answered = tiny.logits(smaller, IDS)
    torch.testing.assert_close(answered, expected, rtol=0, atol=1e-5)
    if case == "nothing":
        assert torch.equal(answered, expected)


@contract
def test_the_dense_model_is_unchanged_and_shares_nothing(name, case):
    model = tiny.model(name)
    layout = layout_of_model(model)
    before = tiny.snapshot(model)
    smaller = cut(model, layout, tiny.MASKS[case](layout))
    tiny.logits(smaller, IDS)
    with torch.no_grad():
        for tensor in (*smaller.parameters(), *smaller.buffers()):
            tensor.fill_(7)
    smaller.config.vocab_size = smaller.generation_config.eos_token_id = 5
    assert tiny.snapshot(model) == before


@contract
def test_a_cut_model_can_be_laid_out_and_cut_again(name, case):
    model, layout, first, once = made(name, case)
    again = layout_of_model(once)
    assert again == layout_of(once.config)
    assert again.units.tolist() == first.allocation.kept.tolist() and again.costs.tolist() == layout.costs.tolist()
    assert (again.total, again.model_type) == (count(once), layout.model_type)
    second = random_mask(again, 8)
    both = Mask(tuple(_within(outer, inner) for outer, inner in zip(first.bits, second.bits, strict=True)))
    twice, at_once = cut(once, again, second), cut(model, layout, both)
    assert torch.equal(tiny.logits(twice, IDS), tiny.logits(at_once, IDS))
    assert twice.config.to_dict() == at_once.config.to_dict() and type(twice) is type(at_once)


def _within(outer, inner):
    bits = outer.copy()
    bits[outer] = inner
    return bits


@contract
def test_greedy_generation_is_that_of_the_masked_model_with_and_without_a_cache(name, case):
    model, layout, mask, smaller = made(name, case)
    prompt = IDS[:, :4]
    with masked(model, layout, mask):
        expected = greedy(model, prompt, use_cache=False)
    assert greedy(smaller, prompt, use_cache=False) == expected
    assert greedy(smaller, prompt, use_cache=True) == expected


@pytest.mark.parametrize("case", ["random", "floors"])
@pytest.mark.parametrize("name", tiny.TINY)
def test_prompts_padded_on_the_left_are_answered_as_alone(name, case):
    smaller = made(name, case)[-1]
    long, short = IDS[:1, :8], IDS[1:, :5]
    padding = np.full((1, 3), 2)
    batch = np.concatenate([long, np.concatenate([padding, short], axis=1)])
    seen = torch.from_numpy(np.concatenate([np.ones_like(long), np.concatenate([0 * padding, np.ones_like(short)], axis=1)]))
    for use_cache in (True, False):
        together = greedy(smaller, batch, attention_mask=seen, use_cache=use_cache)
        assert together == greedy(smaller, long) + greedy(smaller, short)


# --- what else is carried over ---


@pytest.mark.parametrize("name", tiny.TINY)
def test_kept_units_keep_their_weights_in_order(name):
    model, layout, mask, smaller = made(name, "random")
    old, new = model.state_dict(), smaller.state_dict()
    assert set(old) == set(new)
    cut_tensors = set()
    for site, bits in zip(layout.sites, mask.bits, strict=True):
        columns = torch.from_numpy(np.repeat(bits, site.columns))
        assert torch.equal(new[f"{site.reader}.weight"], old[f"{site.reader}.weight"][:, columns])
        cut_tensors.add(f"{site.reader}.weight")
        for module, kept in tiny.owned_by_module(site, bits).items():
            for tensor in {f"{module}.weight", f"{module}.bias"} & set(old):
                assert torch.equal(new[tensor], old[tensor][kept])
                cut_tensors.add(tensor)
    assert all(torch.equal(new[tensor], old[tensor]) for tensor in set(old) - cut_tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", tiny.TINY)
def test_class_dtype_buffers_and_settings(name, dtype):
    model = tiny.model(name, dtype=dtype)
    layout = layout_of_model(model)
    model.generation_config.max_new_tokens = 17
    model.train()
    smaller = cut(model, layout, random_mask(layout))
    assert type(smaller) is PRUNED[layout.model_type][2]
    assert not smaller.training and model.training
    assert {parameter.dtype for parameter in smaller.parameters()} == {dtype} and smaller.config.dtype == dtype
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in smaller.parameters())
    buffers = dict(smaller.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffer, buffers[path]) and buffer.dtype == buffers[path].dtype for path, buffer in model.named_buffers())
    assert smaller.generation_config.max_new_tokens == 17
    tied = smaller.get_input_embeddings().weight is smaller.get_output_embeddings().weight
    assert tied is bool(model.config.tie_word_embeddings)


def test_the_attention_implementation_stays():
    model = tiny.model()
    model.set_attn_implementation("eager")
    layout = layout_of_model(model)
    assert cut(model, layout, random_mask(layout)).config._attn_implementation == "eager"


@pytest.mark.parametrize("do_sample", [True, False])
def test_sampling_values_stay_where_they_are_used(do_sample):
    model = tiny.model()
    model.generation_config.update(do_sample=do_sample, temperature=0.7, top_p=0.9, top_k=7)
    layout = layout_of_model(model)
    settings = cut(model, layout, random_mask(layout)).generation_config
    settings.validate(strict=True)
    kept = (0.7, 0.9, 7) if do_sample else (None, None, None)
    assert (settings.temperature, settings.top_p, settings.top_k) == kept
    assert model.generation_config.temperature == 0.7
