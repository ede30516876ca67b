"""What a cut does to a dense model besides dropping rows and columns: norms over what stays, sub-layers that are gone, and
routers that choose among the experts that are left.

A norm over all units of a site at once norms what stays as if the rest had never been:

    y_i = w_i x_i / sqrt(mean over what stays of x^2 + eps)

A norm that averages over all its columns computes that when removed ones come in as zeros, and what stays comes in times
sqrt(all / kept) and leaves divided by it.

A router whose experts went is asked without their rows: its softmax and its choice are over the others, as if the logits of
those that went were minus infinity. Where fewer are left than a token is sent to, it is sent to all of them.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.llm.architectures import linear
from ppf.llm.experts import routers
from ppf.llm.placement import weight_of
from ppf.space.layout import Site


@contextmanager
def as_cut(model: PreTrainedModel, cuts: Iterable[tuple[Site, np.ndarray]]) -> Iterator[None]:
    """Norms only what stays, sends nothing to experts without a unit, and lets other sites without one add nothing, no bias
    either, while the block runs.

    Args:
        model: The dense model.
        cuts: Sites with Bool[U], which units stay; all experts of a layer or none.
    """
    cuts = list(cuts)
    with ExitStack() as stack:
        stack.enter_context(routed(model, ((site, int(bits.sum())) for site, bits in cuts)))
        for site, bits in cuts:
            if not bits.any():
                reader = linear(model, site.reader)
                stack.callback(reader.register_forward_hook(lambda _, __, output: torch.zeros_like(output)).remove)
                continue
            for rows in () if bits.all() else site.norms:
                norm = model.get_submodule(rows.module)
                scale = (bits.size / bits.sum()) ** 0.5
                columns = torch.from_numpy(np.repeat(bits * scale, rows.width)).to(norm.weight.dtype)
                stack.callback(norm.register_forward_pre_hook(multiply(columns)).remove)
                stack.callback(norm.register_forward_hook(lambda _, __, output, by=scale: output / by).remove)
        yield


def multiply(columns: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """A hook that multiplies what a module reads by Float[C]; where the module runs is known by what it reads."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal columns
        columns = columns.to(inputs[0].device)
        return (inputs[0] * columns, *inputs[1:])

    return hook


@contextmanager
def routed(model: PreTrainedModel, cuts: Iterable[tuple[Site, int]]) -> Iterator[None]:
    """Lets routers choose among the experts that keep a unit while the block runs.

    Args:
        model: The dense model.
        cuts: As ``routers`` takes them.
    """
    with ExitStack() as stack:
        for path, stays in routers(cuts).items():
            # before other hooks on the way out: one may take the weights away again
            stack.callback(model.get_submodule(path).register_forward_hook(choose_among(stays), prepend=True).remove)
        yield


def choose_among(stays: list[int]) -> Callable[[nn.Module, tuple[torch.Tensor, ...], Any], tuple[torch.Tensor, ...]]:
    """A hook that lets a router choose among the experts of these numbers."""

    def choose(router: Any, inputs: tuple[torch.Tensor, ...], _: Any) -> tuple[torch.Tensor, ...]:
        weight = weight_of(router).to(inputs[0].device)
        ids = torch.tensor(stays, dtype=torch.long, device=weight.device)
        fewer = copy.copy(router)
        fewer._parameters = {"weight": weight[ids]}
        fewer.top_k = min(router.top_k, len(stays))
        logits, scores, chosen = type(router).forward(fewer, *inputs)  # not one that was put in its place, of the whole router
        return logits, scores, ids[chosen]

    return choose
