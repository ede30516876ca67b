import numpy as np
import pytest
import torch

import tiny_models as tiny
from builders import random_mask, refuses
from ppf.errors import DamagedError, InputError
from ppf.llm.architectures import layout_of_model, linear
from ppf.llm.masking import masked
from ppf.llm.ridge import RidgeWeights, fit_ridge
from ppf.llm.surgery import cut
from ppf.space.mask import Mask
from ridge_reference import as_fitted

BLOCKS = tiny.blocks(12, 24, seed=4)
IDS = tiny.blocks(2, 14)
families = pytest.mark.parametrize("name", tiny.TINY)
ways = pytest.mark.parametrize("sequential", [False, True])


def prepared(name="llama-gqa-tied", dtype=torch.float32):
    model = tiny.model(name, dtype=dtype)
    layout = layout_of_model(model)
    return model, layout, random_mask(layout, 3)


def alone(layout, index):
    """A mask that cuts one site alone."""
    return Mask(tuple(np.arange(units) % 2 == 0 if at == index else np.ones(units, bool) for at, units in enumerate(layout.units)))


def _flat(values):
    return values.reshape(-1, values.shape[-1])


def seen_at(model, name, what):
    """Float[T, C]: what a module read ("in") or wrote ("out") of the calibration text."""
    seen = []
    hook = lambda _, inputs, output: seen.append(_flat(inputs[0] if what == "in" else output))  # noqa: E731
    handle = linear(model, name).register_forward_hook(hook)
    tiny.logits(model, BLOCKS)
    handle.remove()
    return seen[0].double()


@families
@ways
def test_the_cut_model_answers_as_the_fitted_one(name, sequential):
    model, layout, mask = prepared(name)
    before = tiny.snapshot(model)
    fitted = fit_ridge(model, layout, mask, BLOCKS, sequential=sequential)
    with as_fitted(model, layout, mask, fitted):
        expected = tiny.logits(model, IDS)
    assert tiny.snapshot(model) == before
    torch.testing.assert_close(tiny.logits(cut(model, layout, mask, fitted=fitted), IDS), expected, rtol=0, atol=1e-5)
    assert (expected - tiny.logits(cut(model, layout, mask), IDS)).abs().max() > 1e-3


@pytest.mark.parametrize("name", tiny.SOME)
def test_a_reader_whose_site_alone_is_cut_errs_less_than_without(name):
    """The defining property, on the calibration text; the objective's own value falls, not the error alone."""
    model, layout, _ = prepared(name)
    for index, site in enumerate(layout.sites):
        mask = alone(layout, index)
        dense = seen_at(model, site.reader, "out")
        ours, plain = (
            seen_at(cut(model, layout, mask, fitted=one), site.reader, "out")
            for one in (fit_ridge(model, layout, mask, BLOCKS, sequential=True), None)
        )
        assert (ours - dense).square().mean() < 0.95 * (plain - dense).square().mean()


@ways
def test_the_weights_are_those_of_the_formula(sequential):
    """Against numpy's least squares on stacked rows: the penalty as further rows that ask for the old weights."""
    model, layout, mask = prepared()
    fitted = fit_ridge(model, layout, mask, BLOCKS, penalty=0.1, sequential=sequential)
    for index, (site, bits, weight) in enumerate(zip(layout.sites, mask.bits, fitted.weights, strict=True)):
        keep = np.repeat(bits, site.columns)
        dense = linear(model, site.reader).weight.detach().double().numpy()
        wanted, read = seen_at(model, site.reader, "in").numpy() @ dense.T, seen_at(model, site.reader, "in").numpy()[:, keep]
        if sequential and index:
            below = RidgeWeights(fitted.weights[:index] + tuple(linear(model, one.reader).weight[:, np.repeat(kept, one.columns)]
                          for one, kept in zip(layout.sites[index:], mask.bits[index:], strict=True)))  # fmt: skip
            read = seen_at(cut(model, layout, mask, fitted=below), site.reader, "in").numpy()
        scale = np.sqrt(0.1 * (read**2).mean() * len(read))
        rows = np.concatenate([read, scale * np.eye(read.shape[1])])
        right = np.concatenate([wanted, scale * dense[:, keep].T])
        expected = np.linalg.lstsq(rows, right, rcond=None)[0].T
        np.testing.assert_allclose(weight.numpy(), expected, rtol=0, atol=2e-4)


@ways
def test_a_huge_penalty_changes_nothing(sequential):
    model, layout, mask = prepared()
    fitted = fit_ridge(model, layout, mask, BLOCKS, penalty=1e12, sequential=sequential)
    answered, plain = tiny.logits(cut(model, layout, mask, fitted=fitted), IDS), tiny.logits(cut(model, layout, mask), IDS)
    torch.testing.assert_close(answered, plain, rtol=0, atol=1e-5)


@ways
def test_where_nothing_goes_nothing_changes(sequential):
    model, layout, _ = prepared()
    everything = tiny.MASKS["nothing"](layout)
    fitted = fit_ridge(model, layout, everything, BLOCKS, sequential=sequential)
    with masked(model, layout, everything):
        dense = tiny.logits(model, IDS)
    torch.testing.assert_close(tiny.logits(cut(model, layout, everything, fitted=fitted), IDS), dense, rtol=0, atol=1e-5)


def test_units_that_copy_others_are_replaced_without_loss():
    """A channel that another one equals can go: its weights move to the one that stays."""
    model, layout, _ = prepared()
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("gate_proj", "up_proj"):
                getattr(layer.mlp, name).weight[1::2] = getattr(layer.mlp, name).weight[::2]
    mask = Mask(tuple(np.arange(site.units) % 2 == 0 if site.kind == "ffn" else np.ones(site.units, bool) for site in layout.sites))
    dense = tiny.logits(model, IDS)
    ours, plain = (
        tiny.logits(cut(model, layout, mask, fitted=one), IDS) for one in (fit_ridge(model, layout, mask, BLOCKS, 1e-9), None)
    )
    torch.testing.assert_close(ours, dense, rtol=0, atol=1e-4)
    assert (plain - dense).abs().max() > 0.1


def test_bfloat16_weights_are_fitted_in_full_precision_and_stay_bfloat16():
    model, layout, mask = prepared(dtype=torch.bfloat16)
    fitted = fit_ridge(model, layout, mask, BLOCKS)
    assert {weight.dtype for weight in fitted.weights} == {torch.float32}
    smaller = cut(model, layout, mask, fitted=fitted)
    assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16}


def test_what_cannot_be_fitted_is_refused():
    model, layout, mask = prepared()
    for penalty in (0.0, -1.0, float("nan")):
        with refuses(InputError):
            fit_ridge(model, layout, mask, BLOCKS, penalty)
    with refuses(InputError):
        fit_ridge(model, layout, mask, BLOCKS[:0])
    with torch.no_grad():
        model.model.embed_tokens.weight[int(BLOCKS[0, 0])] = torch.inf
    with refuses(InputError):
        fit_ridge(model, layout, mask, BLOCKS)


def test_weights_of_another_mask_are_refused_and_leave_nothing_behind():
    model, layout, mask = prepared()
    before, fitted = tiny.snapshot(model), fit_ridge(model, layout, mask, BLOCKS)
    for wrong in (RidgeWeights(fitted.weights[:-1]), RidgeWeights(fitted.weights[::-1])):
        with refuses(DamagedError):
            cut(model, layout, mask, fitted=wrong)
    assert tiny.snapshot(model) == before
