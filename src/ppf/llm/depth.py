"""Depth: the layout in which whole sub-layers may go, and a dense model that runs without some of them.

A sub-layer without a unit contributes nothing: its norms and output biases go with it, and the stream passes it unchanged.
A layer that has lost both is dropped from the cut model.
"""

from collections.abc import Iterator
from dataclasses import replace

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
    off it. So do the FFNs of a mixture of experts, whose router needs experts to choose from.

    Args:
        model: The dense model; shapes are enough.
        layout: Its layout.

    Raises:
        UnsupportedError: Norms behind the sub-layers that the stream itself passes through.
    """
    if not can_lose_sublayers(model):
        what = f"whole sub-layers of this {layout.model_type} model"
        raise UnsupportedError(f"--depth must leave a stream that no norm stands in; {what} end in one; fit it without --depth")
    mixed = any(site.role == "expert" for site in layout.sites)
    return replace(layout, sites=tuple(_freed(model, site) if may_go(site, mixed) else site for site in layout.sites))


def may_go(site: Site, mixed: bool) -> bool:
    """Whether a sub-layer may go as a whole; ``mixed`` is whether its model has experts."""
    return site.layer > 0 if site.role == "attn" else not mixed


def _freed(model: PreTrainedModel, site: Site) -> Site:
    layer = stack_of(model)[site.layer]
    parts = [layer.get_submodule(name) for name in parts_of(layer, site.role)]
    held = sum(parameter.numel() for part in parts for parameter in part.parameters())
    return replace(site, floor=0, rest=held - site.units * site.cost)


def stand_ins(model: PreTrainedModel, site: Site) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Owner, name and stand-in of each module of a sub-layer that is gone."""
    layer = stack_of(model)[site.layer]
    for name, other in without(layer, site.role, site.layer).items():
        yield layer, name, other
