"""Experts as linear modules of their own, so that they are masked, scored, cut and exported as everything else is.

transformers keeps the experts of a layer in two 3-D parameters, which forces one width on all. Each expert becomes two
linear modules instead, whose weights are views of those parameters: nothing is copied, and the model computes what it did.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.llm.pruned_model import Experts
from ppf.space.layout import Site


def separate_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Exchanges the fused experts of a model for separate ones, in place; a model without them stays as it is.

    Returns:
        The same model.
    """
    for module in list(model.modules()):
        fused: Any = getattr(module, "experts", None)
        if fused is None or isinstance(fused, Experts):
            continue
        count, hidden, width = fused.down_proj.shape
        with torch.device("meta"):
            experts: Any = Experts(hidden, [width] * count, fused.act_fn)
        for expert, inward, outward in zip(experts, fused.gate_up_proj, fused.down_proj, strict=True):
            expert.gate_up_proj.weight = _part(inward)
            expert.down_proj.weight = _part(outward)
        module.experts = experts.train(fused.training)
    return model


def routers(cuts: Iterable[tuple[Site, int]]) -> dict[str, list[int]]:
    """What routers may still choose from.

    Args:
        cuts: Sites with how many of their units stay; all experts of a layer or none.

    Returns:
        By path of each router that loses an expert, the numbers of those that stay.
    """
    stays: dict[str, list[bool]] = {}
    for site, kept in cuts:
        if site.role == "expert":
            stays.setdefault(f"{site.reader.partition('.experts.')[0]}.gate", []).append(kept > 0)
    return {path: [index for index, stay in enumerate(those) if stay] for path, those in stays.items() if not all(those)}


def _part(weight: torch.Tensor) -> nn.Parameter:
    """A parameter that shares its memory with a part of another."""
    return nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
