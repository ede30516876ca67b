import numpy as np
import pytest
import torch

import tiny_models as tiny
from builders import random_mask, refuses
from ppf.errors import UnsupportedError
from ppf.llm.architectures import layout_of_model, linear
from ppf.llm.masking import masked, narrowed

IDS = tiny.blocks(2, 9)
contract = pytest.mark.parametrize(("name", "case"), tiny.CONTRACT)


def masked_logits(model, layout, mask):
    with masked(model, layout, mask):
        return tiny.logits(model, IDS)


@pytest.mark.parametrize("name", sorted(set(tiny.TINY) - {"olmo2-gqa"}))  # it norms what stays anew
def test_masking_is_zeroing_the_columns_that_read_removed_units(name):
    model, zeroed = tiny.model(name), tiny.model(name)
    layout = layout_of_model(model)
    mask = random_mask(layout, 5)
    for site, bits in zip(layout.sites, mask.bits, strict=True):
        with torch.no_grad():
            linear(zeroed, site.reader).weight[:, np.repeat(~bits, site.columns)] = 0
    torch.testing.assert_close(masked_logits(model, layout, mask), tiny.logits(zeroed, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", tiny.TINY)
def test_weights_of_removed_units_do_not_matter(name):
    model = tiny.model(name)
    layout = layout_of_model(model)
    mask = random_mask(layout, 6)
    before = masked_logits(model, layout, mask)
    for site, bits in zip(layout.sites, mask.bits, strict=True):
        for module, rows in tiny.owned_by_module(site, ~bits).items():
            with torch.no_grad():
                model.get_submodule(module).weight[rows] += 1
    assert not torch.equal(tiny.logits(model, IDS), before)
    assert torch.equal(masked_logits(model, layout, mask), before)


@contract
def test_the_dense_model_comes_back_bit_for_bit(name, case):
    model = tiny.model(name)
    layout = layout_of_model(model)
    before, dense = tiny.snapshot(model), tiny.logits(model, IDS)
    changed = masked_logits(model, layout, tiny.MASKS[case](layout))
    assert torch.equal(changed, dense) is (case == "nothing")
    assert tiny.snapshot(model) == before
    assert torch.equal(tiny.logits(model, IDS), dense)


def test_the_dense_model_comes_back_when_the_block_fails():
    model = tiny.model()
    layout = layout_of_model(model)
    before = tiny.snapshot(model)
    with pytest.raises(KeyError), masked(model, layout, random_mask(layout)) as inside:
        assert inside is model and tiny.snapshot(model)["hooks"]
        raise KeyError
    assert tiny.snapshot(model) == before


def test_a_site_that_cannot_be_masked_leaves_nothing_behind():
    model = tiny.model()
    layout = layout_of_model(model)
    model.model.layers[2].mlp.down_proj = torch.nn.Identity()
    with refuses(UnsupportedError), masked(model, layout, tiny.MASKS["floors"](layout)):
        pass
    assert tiny.snapshot(model)["hooks"] == []


def test_masks_in_bfloat16_stay_in_bfloat16():
    model = tiny.model(dtype=torch.bfloat16)
    layout = layout_of_model(model)
    assert masked_logits(model, layout, random_mask(layout)).dtype == torch.bfloat16


@contract
def test_narrowing_is_masking_with_less_to_compute(name, case):
    model = tiny.model(name)
    layout, mask = layout_of_model(model), tiny.MASKS[case](layout_of_model(model))
    before, parameters = tiny.snapshot(model), dict(model.named_parameters())
    with narrowed(model, layout, mask):
        answered = tiny.logits(model, IDS)
        assert sum(parameter.numel() for parameter in model.parameters()) == layout.kept_params(mask.allocation.kept)
    with narrowed(model, layout, mask, kept_bytes=0):
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
        assert torch.equal(tiny.logits(model, IDS), answered)
        assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    torch.testing.assert_close(answered, masked_logits(model, layout, mask), rtol=0, atol=1e-5)
    assert tiny.snapshot(model) == before
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


def test_layers_beyond_what_may_stay_are_cut_only_while_they_run():
    model = tiny.model()
    layout, seen = layout_of_model(model), []
    mask = tiny.MASKS["floors"](layout)
    of_a_layer = sum(site.cost * site.floor for site in layout.sites if site.layer == 0) * model.dtype.itemsize
    dense = [linear(model, site.reader).weight for site in layout.sites]

    def cut_now(layer):
        return [
            linear(model, s.reader).weight is not weight for s, weight in zip(layout.sites, dense, strict=True) if s.layer == layer
        ]

    with narrowed(model, layout, mask, kept_bytes=of_a_layer):
        assert [all(cut_now(layer)) for layer in range(layout.layers)] == [True] + [False] * (layout.layers - 1)
        for reader in (linear(model, site.reader) for site in layout.sites):
            reader.register_forward_pre_hook(lambda *_: seen.append([any(cut_now(layer)) for layer in range(layout.layers)]))
        tiny.logits(model, IDS)
    assert seen == [[other in (0, site.layer) for other in range(layout.layers)] for site in layout.sites]


@pytest.mark.parametrize("kept_bytes", [2**28, 0])
def test_the_dense_weights_come_back_when_the_block_fails(kept_bytes):
    model = tiny.model()
    layout = layout_of_model(model)
    before = tiny.snapshot(model)
    with pytest.raises(KeyError), narrowed(model, layout, random_mask(layout), kept_bytes):
        assert tiny.snapshot(model) != before
        raise KeyError
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize("failure", [ZeroDivisionError, KeyboardInterrupt])
def test_the_dense_weights_come_back_when_a_layer_fails(monkeypatch, failure):
    model = tiny.model()
    layout, parameters = layout_of_model(model), dict(model.named_parameters())

    def fail(_):
        raise failure

    with narrowed(model, layout, random_mask(layout), kept_bytes=0):
        monkeypatch.setattr(model.model.layers[2].mlp.act_fn, "forward", fail)
        with pytest.raises(failure):
            tiny.logits(model, IDS)
        is_back = [parameter is parameters[name] for name, parameter in model.named_parameters()]
        assert all(is_back) or failure is KeyboardInterrupt
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
