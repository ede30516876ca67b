from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_models as tiny
from builders import importance, refuses
from ppf.errors import UnsupportedError
from ppf.llm.architectures import layout_of_model
from ppf.llm.prefix import Span, permute, prefix_of, spans_of
from ppf.space.layout import Layout, Rows


def with_first(layout, **changes):
    """The layout with another first site."""
    return Layout(layout.model_type, layout.layers, (replace(layout.sites[0], **changes), *layout.sites[1:]), layout.total)


def test_every_layer_of_a_site_has_a_span():
    model = tiny.model()
    layout = layout_of_model(model)
    spans = spans_of(model, layout)
    assert len(spans) == 7 * layout.layers
    for index, site in enumerate(layout.sites):
        assert spans[site.reader] == Span(None, (index, site.columns))
        assert all(spans[rows.module] == Span((index, (rows.width,)), None) for rows in site.writers)


def test_blocks_of_one_layer_are_one_span():
    model = tiny.model("phi3-gqa")
    layout = layout_of_model(model)
    spans = spans_of(model, layout)
    assert len(spans) == 4 * layout.layers
    attn, ffn = layout.sites[:2]
    assert spans[attn.writers[0].module] == Span((0, tuple(rows.width for rows in attn.writers)), None)
    assert spans[ffn.writers[0].module] == Span((1, (1, 1)), None)


def test_a_norm_over_all_units_of_a_site_has_a_span():
    model = tiny.model("olmo2-gqa")
    layout = layout_of_model(model)
    spans = spans_of(model, layout)
    for norm in layout.sites[0].norms:
        assert spans[norm.module] == Span((0, (norm.width,)), None)


@pytest.mark.parametrize(
    "writers",
    [(Rows("{}", 0, 4), Rows("{}", 20, 4)), (Rows("{}", 16, 4), Rows("{}", 0, 4)), (Rows("{}", 8, 8),), (Rows("{}", 0, 4),)],
    ids=["gap", "order", "later", "half"],
)
def test_units_that_no_prefix_can_hold_are_refused(writers):
    model = tiny.model("llama-mha")
    layout = layout_of_model(model)
    name = layout.sites[0].writers[0].module
    with refuses(UnsupportedError) as caught:
        spans_of(model, with_first(layout, writers=tuple(replace(rows, module=name) for rows in writers)))
    assert name in str(caught.value)


def test_a_layer_that_reads_two_sites_is_refused():
    model = tiny.model("llama-mha")
    layout = layout_of_model(model)
    with refuses(UnsupportedError):
        spans_of(model, with_first(layout, reader=layout.sites[2].reader))


def test_a_layer_can_be_written_by_one_site_and_read_another():
    layer, scores = torch.nn.Linear(6, 4), importance(layout_of_model(tiny.model()), 3)
    weight, bias, order = layer.weight.detach().clone(), layer.bias.detach().clone(), scores.order[0]
    span = Span((0, (2,)), (2, 3))
    whole = permute(layer, span, scores)
    rows, columns = (np.concatenate([np.arange(w) + w * unit for unit in scores.order[site]]) for site, w in ((0, 2), (2, 3)))
    assert torch.equal(layer.weight, weight[rows][:, columns]) and torch.equal(layer.bias, bias[rows])
    kept = np.array([1, 40, 1])
    ((some, less),) = prefix_of(whole, span, kept)
    assert torch.equal(some, weight[2 * order[0] : 2 * order[0] + 2][:, columns[:3]]) and torch.equal(less, bias[rows[:2]])
    assert some.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()


def test_of_every_block_a_prefix_runs_and_of_all_units_the_whole():
    layer, scores = torch.nn.Linear(4, 10), importance(layout_of_model(tiny.model()), 3)  # two units of 3 rows and of 2
    weight, order, span = layer.weight.detach().clone(), scores.order[0], Span((0, (3, 2)), None)
    whole = permute(layer, span, scores)
    (first, _), (second, bias) = prefix_of(whole, span, np.array([1, 40]))
    assert torch.equal(first, weight[3 * order[0] : 3 * order[0] + 3])
    assert torch.equal(second, weight[6 + 2 * order[0] : 8 + 2 * order[0]]) and torch.equal(bias, layer.bias[6:8])
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()
    ((all_of_it, _),) = prefix_of(whole, span, np.array([2, 40]))
    assert torch.equal(all_of_it, layer.weight)


def test_two_sites_in_one_layer_are_refused():
    model = tiny.model("llama-mha")
    layout = layout_of_model(model)
    with refuses(UnsupportedError):
        spans_of(model, with_first(layout, writers=(*layout.sites[0].writers, layout.sites[2].writers[0])))
