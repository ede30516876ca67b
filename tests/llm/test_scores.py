import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import tiny_models as tiny
from builders import refuses
from ppf.errors import InputError
from ppf.llm import head, scores
from ppf.llm.architectures import layout_of_model, linear
from ppf.llm.scores import SCORES, score_units

BLOCKS = tiny.blocks(5, 12)
DATA_DRIVEN = ["taylor", "flap", "wanda_sp"]
every = pytest.mark.parametrize("method", SCORES)


def scored(model, method, blocks=BLOCKS, seed=0):
    return score_units(model, layout_of_model(model), blocks, method, "a text", seed)


def columns_of(model, site):
    """Int[U, C]: the reader's columns of each unit."""
    return np.arange(linear(model, site.reader).in_features).reshape(site.units, site.columns)


def kill(model, site, unit):
    """Makes a unit give nothing to its reader, and its reader deaf to it."""
    with torch.no_grad():
        for rows in site.writers:
            module, own = linear(model, rows.module), tiny.owned(rows, np.arange(site.units) == unit)
            module.weight[own] = 0
            if module.bias is not None:
                module.bias[own] = 0
        linear(model, site.reader).weight[:, columns_of(model, site)[unit]] = 0


def inputs_of_readers(model, blocks):
    """Per reader Float[T, C]: what it read of all tokens."""
    seen, handles = {}, []
    for site in layout_of_model(model).sites:
        hook = lambda _, args, name=site.reader: seen.update({name: args[0].reshape(-1, args[0].shape[-1]).double()})  # noqa: E731
        handles.append(linear(model, site.reader).register_forward_pre_hook(hook))
    tiny.logits(model, blocks)
    for handle in handles:
        handle.remove()
    return seen


# --- the contract of every score ---


@every
@pytest.mark.parametrize("name", tiny.TINY)
def test_scores_are_finite_differ_and_have_the_right_sizes(name, method):
    model = tiny.model(name)
    importance = scored(model, method)
    assert [len(score) for score in importance.scores] == layout_of_model(model).units.tolist()
    assert (importance.method, importance.source) == (method, "a text")
    for score in importance.scores:
        assert np.isfinite(score).all() and (score > 0).all() and len(set(score.tolist())) == len(score)


@every
@pytest.mark.parametrize("grad", [True, False, "some"])
def test_the_model_is_unchanged_and_its_gradients_are_as_before(method, grad):
    model = tiny.model("llama-biases")
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0 if grad == "some" else grad)
    before = tiny.snapshot(model)
    scored(model, method)
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize("method", DATA_DRIVEN)
def test_the_model_is_unchanged_when_scoring_fails(method):
    model = tiny.model()
    before = tiny.snapshot(model)
    with pytest.raises(IndexError):
        scored(model, method, blocks=np.full((2, 8), 10**6))
    assert tiny.snapshot(model) == before


@every
def test_scores_are_reproducible_and_only_random_ones_need_the_seed(method):
    one, again, other = (scored(tiny.model(), method, seed=seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one.scores, again.scores, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(one.scores, other.scores, strict=True)) is (method != "random")


@pytest.mark.parametrize("method", [*DATA_DRIVEN, "magnitude"])
@pytest.mark.parametrize("name", tiny.TINY)
def test_a_dead_unit_is_ranked_last(name, method):
    model = tiny.model(name)
    layout = layout_of_model(model)
    dead = [units // 2 for units in layout.units]
    for site, unit in zip(layout.sites, dead, strict=True):
        kill(model, site, unit)
    importance = scored(model, method)
    assert [order[-1] for order in importance.order] == dead
    assert [score[unit] for score, unit in zip(importance.scores, dead, strict=True)] == pytest.approx([0] * len(dead), abs=1e-9)


@pytest.mark.parametrize("method", DATA_DRIVEN)
def test_another_text_gives_other_scores(method):
    one, other = scored(tiny.model(), method), scored(tiny.model(), method, blocks=tiny.blocks(5, 12, seed=1))
    assert not any(np.allclose(a, b) for a, b in zip(one.scores, other.scores, strict=True))


@every
def test_half_precision_gives_nearly_the_same_order(method):
    full, half = scored(tiny.model(), method), scored(tiny.model(dtype=torch.bfloat16), method)
    for a, b in zip(full.scores, half.scores, strict=True):
        assert len(a) < 3 or np.corrcoef(a, b)[0, 1] > 0.97


def test_unknown_scores_are_refused_with_the_known_ones():
    with refuses(InputError) as caught:
        scored(tiny.model(), "hessian")
    assert all(method in str(caught.value) for method in SCORES)


# --- what each one is ---


@pytest.mark.parametrize("name", tiny.TINY)
def test_taylor_is_the_squared_gradient_of_the_loss_by_the_mask(name):
    """A gate on a column acts as a factor on the reader's weights there, so their own gradients give the same number."""
    model = tiny.model(name)
    importance = scored(model, "taylor")
    for index, site in enumerate(layout_of_model(model).sites):
        weight, expected = linear(model, site.reader).weight, 0
        for row in torch.from_numpy(BLOCKS):
            loss = functional.cross_entropy(model(row[None]).logits[0, :-1], row[1:], reduction="sum")
            gradient = torch.autograd.grad(loss, weight, materialize_grads=True)[0]
            expected = expected + ((weight * gradient).sum(0) ** 2).detach().numpy()
        expected = expected[columns_of(model, site)].sum(1)
        np.testing.assert_allclose(importance.scores[index], expected, rtol=2e-3)


def test_taylor_is_the_slope_of_the_loss_along_the_mask():
    model = tiny.model("llama-mha").double()
    site = layout_of_model(model).sites[1]
    reader, row = linear(model, site.reader), torch.from_numpy(BLOCKS[:1])

    def loss(factor):
        factors = torch.ones(40, dtype=torch.float64)
        factors[7] = factor
        handle = reader.register_forward_pre_hook(lambda _, args: (args[0] * factors,))
        with torch.inference_mode():
            value = functional.cross_entropy(model(row).logits[0, :-1], row[0, 1:], reduction="sum").item()
        handle.remove()
        return value

    slope = (loss(1.02) - loss(0.98)) / 0.04
    assert scored(model, "taylor", blocks=BLOCKS[:1]).scores[1][7] == pytest.approx(slope**2, rel=0.01)


@pytest.mark.parametrize("at_once", [1, 2**24])
def test_a_head_may_lie_on_another_device_than_the_last_layer(monkeypatch, at_once):
    """As a tied one does where the model is spread. The tensors are of devices that need not be here, and hold no values."""
    monkeypatch.setattr(head, "LOGITS_AT_ONCE", at_once)
    monkeypatch.setattr(scores, "logits_of", lambda model, part: part.to("cuda:0") @ torch.ones(4, tiny.VOCAB, device="cuda:0"))
    monkeypatch.setattr(scores, "states_of", lambda model, rows: torch.ones(11, 4, device="cuda:1"))
    row = BLOCKS[0]
    with FakeTensorMode():
        loss = scores._loss(tiny.model(), row)
    assert loss.device == torch.device("cuda:1")


def test_small_gradients_do_not_vanish_in_float16():
    blocks = tiny.blocks(3, 48)
    scores = []
    for dtype in (torch.float32, torch.float16):
        model = tiny.model("llama-mha", dtype=dtype)
        with torch.no_grad():
            model.lm_head.weight *= 5e-5
        scores.append(scored(model, "taylor", blocks).scores)
    for full, half in zip(*scores, strict=True):
        assert np.corrcoef(full, half)[0, 1] > 0.99


@pytest.mark.parametrize("name", tiny.TINY)
def test_the_activation_scores_are_their_formulas(name):
    model = tiny.model(name)
    flap, wanda = scored(model, "flap"), scored(model, "wanda_sp")
    seen = inputs_of_readers(model, BLOCKS)
    for index, site in enumerate(layout_of_model(model).sites):
        inputs, weight = seen[site.reader], linear(model, site.reader).weight.detach().double()
        own, share = columns_of(model, site), len(inputs) / BLOCKS.size  # less than 1 for an expert
        fluctuation = (inputs.var(0, correction=0) * weight.square().sum(0)).numpy()[own].sum(1)
        strength = (inputs.square().mean(0).sqrt() * weight.abs().mean(0)).numpy()[own].sum(1)
        np.testing.assert_allclose(flap.scores[index], share * fluctuation, rtol=1e-3)
        np.testing.assert_allclose(wanda.scores[index], share**0.5 * strength, rtol=1e-3)


def test_magnitude_reads_the_readers_columns_and_no_text():
    model = tiny.model()
    importance = scored(model, "magnitude", blocks=np.zeros((0, 8), dtype=np.int64))
    for index, site in enumerate(layout_of_model(model).sites):
        norms = linear(model, site.reader).weight.detach().norm(dim=0).numpy()
        np.testing.assert_allclose(importance.scores[index], norms[columns_of(model, site)].sum(1), rtol=1e-5)


@pytest.mark.parametrize("method", DATA_DRIVEN)
def test_blocks_are_summed_and_their_order_does_not_matter(method):
    model = tiny.model()
    one, other = scored(model, method), scored(model, method, blocks=BLOCKS[::-1])
    for a, b in zip(one.scores, other.scores, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4)
