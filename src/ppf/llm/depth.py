"""Depth: the layout in which whole sub-layers and experts may go, and a dense model that runs without some of them.

A sub-layer without a unit contributes nothing: its norms and output biases go with it, and the stream passes it unchanged.
A layer that has lost both is dropped from the cut model. An expert without a unit is dropped with its row of the router, which
then chooses among the others; where none is left and no expert sees all tokens, the FFN is gone.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ppf.errors import UnsupportedError
from ppf.llm.architectures import stack_of
from ppf.llm.pruned_model import parts_of, without
from ppf.space.layout import Layout, Site


def can_lose_sublayers(model: PreTrainedModel) -> bool:
    """Whether the stream itself passes through no norm, as it does in some sizes of OPT, where a sub-layer's belongs to it."""
    return getattr(model.config, "do_layer_norm_before", True)


def with_depth(model: PreTrainedModel, layout: Layout) -> Layout:
    """A layout whose sub-layers may go as a whole: floors of 0, and what goes with the last unit.

    The attention of the first layer keeps its floor: caches count their tokens there, and llama.cpp reads the width of all heads
    off it. So does an expert that all tokens see.

    Args:
        model: The dense model; shapes are enough.
        layout: Its layout.

    Raises:
        UnsupportedError: Norms behind the sub-layers that the stream itself passes through.
    """
    if not can_lose_sublayers(model):
        what = f"whole sub-layers of this {layout.model_type} model"
        raise UnsupportedError(f"--depth must leave a stream that no norm stands in; {what} end in one; fit it without --depth")
    return replace(layout, sites=tuple(_freed(model, site) if may_go(site) else site for site in layout.sites))


def may_go(site: Site) -> bool:
    """Whether a sub-layer, or an expert, may go as a whole."""
    return site.layer > 0 if site.role == "attn" else not site.sees_all


def _freed(model: PreTrainedModel, site: Site) -> Site:
    layer: Any = stack_of(model)[site.layer]
    if site.role == "expert":
        last = _held(layer, "ffn") - _size(layer.mlp) if site.kind == "expert0" and not hasattr(layer.mlp, "shared_expert") else 0
        return replace(site, floor=0, rest=layer.mlp.gate.weight.shape[1], last_rest=last)
    return replace(site, floor=0, rest=_held(layer, site.role) - site.units * site.cost)


def _held(layer: nn.Module, part: str) -> int:
    """Parameters of a sub-layer, its norms included."""
    return sum(_size(layer.get_submodule(name)) for name in parts_of(layer, part))


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def stand_ins(model: PreTrainedModel, site: Site) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Owner, name and stand-in of each module of a sub-layer that is gone; none of an expert, which no token reaches."""
    layer = stack_of(model)[site.layer]
    if site.role == "expert":
        return
    for name, other in without(layer, site.role, site.layer).items():
        yield layer, name, other
