import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import tiny_models as tiny
from builders import random_mask, refuses
from ppf.errors import DamagedError, InputError
from ppf.llm.architectures import layout_of, layout_of_model, linear
from ppf.llm.compensation import Fill, bias_params, reader_means
from ppf.llm.masking import masked
from ppf.llm.surgery import cut
from ppf.space.mask import Mask

BLOCKS = tiny.blocks(5, 12, seed=4)
IDS = tiny.blocks(2, 14)
families = pytest.mark.parametrize("name", tiny.TINY)
contract = pytest.mark.parametrize(
    ("name", "case"), [pair for pair in tiny.CONTRACT if pair[0] in tiny.LLAMA_LIKE or pair[1] == "random"]
)


def prepared(name="llama-gqa-tied", dtype=torch.float32):
    model = tiny.model(name, dtype=dtype)
    layout = layout_of_model(model)
    return model, layout, reader_means(model, layout, BLOCKS)


def masked_logits(model, layout, mask, fill):
    with masked(model, layout, mask, fill):
        return tiny.logits(model, IDS)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


def removed_of(site, bits):
    return torch.from_numpy(np.repeat(~bits, site.columns))


def _flat(values):
    return values.reshape(-1, values.shape[-1])


def seen_at(model, name, blocks, what):
    """Float[T, C]: what a module read ("in") or wrote ("out") for all tokens."""
    seen = []
    hook = lambda _, inputs, output: seen.append(_flat(inputs[0] if what == "in" else output))  # noqa: E731
    handle = linear(model, name).register_forward_hook(hook)
    tiny.logits(model, blocks)
    handle.remove()
    return seen[0]


# --- the contract of every family and mask ---


@contract
def test_the_cut_model_answers_as_the_masked_one(name, case):
    model, layout, fill = prepared(name)
    mask = tiny.MASKS[case](layout)
    answered, expected = tiny.logits(cut(model, layout, mask, fill), IDS), masked_logits(model, layout, mask, fill)
    torch.testing.assert_close(answered, expected, rtol=0, atol=1e-5)
    without = tiny.logits(cut(model, layout, mask), IDS)
    if case == "nothing":
        assert torch.equal(answered, tiny.logits(model, IDS)) and torch.equal(expected, answered)
    else:
        assert (answered - without).abs().max() > 1e-3


@contract
def test_parameters_are_those_of_the_layout_and_the_biases(name, case):
    model, layout, fill = prepared(name)
    mask = tiny.MASKS[case](layout)
    smaller = cut(model, layout, mask, fill)
    assert count(smaller) == layout.kept_params(mask.allocation.kept) + bias_params(model, layout, mask.allocation.kept)
    assert smaller.config.reader_bias and all(linear(smaller, site.reader).bias is not None for site in layout.sites)
    assert bias_params(smaller, layout, layout.units) == 0
    writers = {rows.module for site in layout.sites for rows in site.writers}
    assert all((linear(smaller, name).bias is None) is (linear(model, name).bias is None) for name in writers)


@contract
def test_the_dense_model_is_unchanged_and_shares_nothing(name, case):
    model = tiny.model(name)
    layout = layout_of_model(model)
    before = tiny.snapshot(model)
    fill = reader_means(model, layout, BLOCKS)
    mask = tiny.MASKS[case](layout)
    smaller = cut(model, layout, mask, fill)
    masked_logits(model, layout, mask, fill)
    with torch.no_grad():
        for tensor in (*smaller.parameters(), *smaller.buffers()):
            tensor.fill_(7)
    assert tiny.snapshot(model) == before


@contract
def test_without_a_fill_nothing_is_added(name, case):
    model = tiny.model(name)
    layout = layout_of_model(model)
    smaller = cut(model, layout, tiny.MASKS[case](layout))
    assert "reader_bias" not in smaller.config.to_dict() and smaller.state_dict().keys() == model.state_dict().keys()


# --- what the fill is ---


@families
def test_the_means_are_those_of_all_tokens(name):
    model, layout, fill = prepared(name)
    for site, mean in zip(layout.sites, fill.means, strict=True):
        expected = seen_at(model, site.reader, BLOCKS, "in").double().mean(0).numpy()
        np.testing.assert_allclose(mean, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", tiny.SOME)
def test_a_reader_whose_site_alone_is_cut_writes_the_same_on_average(name):
    """The defining property: on the calibration text the mean error of the reader's output is zero."""
    model, layout, fill = prepared(name)
    all_of_it = random_mask(layout, 3)
    for index, site in enumerate(layout.sites):
        if site.norms:  # what stays is normed anew, which no bias makes up for
            continue
        kept = [bits if at == index else np.ones_like(bits) for at, bits in enumerate(all_of_it.bits)]
        kept[index] = np.arange(site.units) % 2 == 0
        dense = seen_at(model, site.reader, BLOCKS, "out").mean(0)
        after, plain = (
            seen_at(cut(model, layout, Mask(tuple(kept)), one), site.reader, BLOCKS, "out").mean(0) for one in (fill, None)
        )
        torch.testing.assert_close(after, dense, rtol=0, atol=1e-5)
        assert (plain - dense).abs().max() > 1e-3


@families
def test_masking_puts_the_mean_into_removed_columns_and_nothing_else(name):
    model, layout, fill = prepared(name)
    mask = random_mask(layout, 3)
    site, removed = layout.sites[0], removed_of(layout.sites[0], mask.bits[0])
    before = seen_at(model, site.reader, IDS, "in")
    with masked(model, layout, mask, fill):
        after = seen_at(model, site.reader, IDS, "in")
    assert torch.equal(after[:, ~removed], before[:, ~removed])
    assert torch.equal(after[:, removed], torch.from_numpy(fill.means[0].copy())[removed].expand(len(after), -1))


@families
def test_the_bias_is_the_mean_of_what_went_and_the_own_bias(name):
    model, layout, fill = prepared(name)
    mask = random_mask(layout, 3)
    smaller = cut(model, layout, mask, fill)
    for site, bits, mean in zip(layout.sites, mask.bits, fill.means, strict=True):
        reader, removed = linear(model, site.reader), removed_of(site, bits)
        own = 0 if reader.bias is None else reader.bias
        expected = reader.weight[:, removed] @ torch.from_numpy(mean.copy())[removed] + own
        torch.testing.assert_close(linear(smaller, site.reader).bias, expected, rtol=0, atol=1e-6)
        assert torch.equal(linear(smaller, site.reader).weight, reader.weight[:, ~removed])


@pytest.mark.parametrize(("name", "added"), [("llama-biases", 0), ("qwen3-biases", 3 * 32), ("qwen3-gqa", 6 * 32)])
def test_only_readers_without_a_bias_get_one(name, added):
    model = tiny.model(name)
    layout = layout_of_model(model)
    assert bias_params(model, layout, layout.units) == added


@families
def test_generation_is_that_of_the_masked_model_with_and_without_a_cache(name):
    model, layout, fill = prepared(name)
    mask = random_mask(layout, 3)
    smaller = cut(model, layout, mask, fill)
    settings = GenerationConfig(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=2, eos_token_id=2)
    ids = torch.from_numpy(IDS[:, :4])
    with masked(model, layout, mask, fill):
        expected = model.generate(input_ids=ids, generation_config=settings, use_cache=False)
    for use_cache in (True, False):
        assert torch.equal(smaller.generate(input_ids=ids, generation_config=settings, use_cache=use_cache), expected)


@families
def test_bfloat16_stays_and_means_are_summed_exactly(name):
    model, layout, fill = prepared(name, torch.bfloat16)
    mask = random_mask(layout, 3)
    smaller = cut(model, layout, mask, fill)
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16}
    answered, expected = tiny.logits(smaller, IDS), masked_logits(model, layout, mask, fill)
    assert answered.dtype == expected.dtype == torch.bfloat16
    assert (answered - expected).abs().float().mean() < 0.02 * expected.float().abs().mean()
    for site, bits, mean in zip(layout.sites, mask.bits, fill.means, strict=True):
        reader, removed = linear(model, site.reader), removed_of(site, bits)
        exact = reader.weight[:, removed].double() @ torch.from_numpy(mean.copy())[removed].double()
        exact = exact if reader.bias is None else exact + reader.bias.double()
        torch.testing.assert_close(linear(smaller, site.reader).bias.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_double_precision_model_keeps_its_precision():
    model = tiny.model("llama-biases", dtype=torch.float64)
    layout = layout_of_model(model)
    kept = Mask(tuple(np.ones(units, dtype=bool) for units in layout.units))
    smaller = cut(model, layout, kept, reader_means(model, layout, BLOCKS))
    assert torch.equal(tiny.logits(smaller, IDS), tiny.logits(model, IDS))


# --- a compensated model is a model like any other ---


def within(outer, inner):
    bits = outer.copy()
    bits[outer] = inner
    return bits


@contract
def test_a_compensated_model_can_be_laid_out_and_cut_again(name, case):
    model, layout, fill = prepared(name)
    first = tiny.MASKS[case](layout)
    once = cut(model, layout, first, fill)
    again = layout_of_model(once)
    assert again == layout_of(once.config) and again.costs.tolist() == layout.costs.tolist()
    assert (again.total, again.model_type) == (count(once), layout.model_type)
    second = random_mask(again, 8)
    twice = cut(once, again, second)
    assert all(torch.equal(linear(twice, site.reader).bias, linear(once, site.reader).bias) for site in again.sites)
    torch.testing.assert_close(tiny.logits(twice, IDS), masked_logits(once, again, second, None), rtol=0, atol=1e-5)
    assert twice.config.reader_bias and count(twice) == again.kept_params(second.allocation.kept)


@families
def test_two_cuts_with_the_dense_means_are_one(name):
    model, layout, fill = prepared(name)
    first = random_mask(layout, 3)
    once = cut(model, layout, first, fill)
    again = layout_of_model(once)
    second = random_mask(again, 8)
    sites = zip(layout.sites, first.bits, fill.means, strict=True)
    rest = Fill(tuple(mean[np.repeat(bits, site.columns)] for site, bits, mean in sites))
    both = Mask(tuple(within(outer, inner) for outer, inner in zip(first.bits, second.bits, strict=True)))
    twice, at_once = cut(once, again, second, rest), cut(model, layout, both, fill)
    torch.testing.assert_close(tiny.logits(twice, IDS), tiny.logits(at_once, IDS), rtol=0, atol=1e-5)
    assert twice.config.to_dict() == at_once.config.to_dict()


# --- refusals ---


def test_the_fill_of_another_model_is_refused_and_leaves_nothing_behind():
    model, layout, fill = prepared()
    before = tiny.snapshot(model)
    for means in (fill.means[:-1], fill.means[::-1], (fill.means[0][:-1], *fill.means[1:])):
        with refuses(DamagedError):
            cut(model, layout, random_mask(layout), Fill(means))
        with refuses(DamagedError), masked(model, layout, random_mask(layout), Fill(means)):
            pass
    assert tiny.snapshot(model) == before


def test_means_that_are_not_finite_numbers_are_refused():
    model, layout, fill = prepared()
    for wrong in (np.full(3, np.nan), np.full(3, np.inf), np.zeros((2, 2))):
        with refuses(InputError):
            Fill((*fill.means, wrong))
    with refuses(InputError):
        reader_means(model, layout, BLOCKS[:0])
    with torch.no_grad():
        model.model.embed_tokens.weight[int(BLOCKS[0, 0])] = torch.inf
    with refuses(InputError):
        reader_means(model, layout, BLOCKS)


def test_a_fill_is_its_own_and_cannot_be_changed():
    given = np.arange(3.0)
    fill = Fill((given,))
    given[0] = 7
    assert fill.means[0].tolist() == [0, 1, 2] and fill.means[0].dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        fill.means[0][0] = 1
