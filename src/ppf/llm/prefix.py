"""Prefixes of linear layers: how the units of a site lie in them, and the layer that uses as much of itself as its thread says.

writer   ████████░░░░  rows [:k]        reader   ████████░░░░  columns [:k]
         kept    not read                        kept    not read

A site that keeps nothing runs its first unit, which no code of any family can do without, into a reader of zeros.
"""

import threading
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ppf.errors import UnsupportedError
from ppf.llm.architectures import linear
from ppf.space.allocation import Allocation
from ppf.space.importance import Importance
from ppf.space.layout import Layout


@dataclass(frozen=True, eq=False)
class View:
    """The model at one allocation: views of its tensors, no memory of their own.

    Attributes:
        allocation: Int[S] kept units.
        tensors: Of every layer that a site touches its weight and its bias, if it has one.
    """

    allocation: Allocation
    tensors: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]


@dataclass(frozen=True)
class Span:
    """Which site numbers the rows and the columns of a layer, and how many of them a unit has; None: they all stay."""

    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


class Running(threading.local):
    """What runs in this thread."""

    def __init__(self, dense: View) -> None:
        self.view = dense


class PrefixLinear(nn.Linear):
    """A linear layer that uses as much of itself as its thread says.

    Its type keeps it from being cut: the importance of its model no longer fits the order of its units.
    """

    def __init__(self, dense: nn.Linear, index: int, running: Running) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.weight, self.bias = dense.weight, dense.bias
        self.index, self.running = index, running

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.running.view.tensors[self.index]
        return functional.linear(input, weight, bias)


def spans_of(model: PreTrainedModel, layout: Layout) -> dict[str, Span]:
    """By name of a layer what the sites number in it.

    Raises:
        UnsupportedError: Units that no prefix of a layer can hold.
    """
    rows: dict[str, tuple[int, int]] = {}
    columns: dict[str, tuple[int, int]] = {}
    for index, site in enumerate(layout.sites):
        for part in site.writers:
            whole = part.offset == 0 and site.units * part.width == linear(model, part.module).out_features
            if part.module in rows or not whole:
                raise UnsupportedError(
                    f"an elastic model must have a layer of its own for queries, keys, values, gate and up; {part.module} "
                    f"of this {layout.model_type} model holds several; prune it to a fixed ratio with ppf prune"
                )
            rows[part.module] = (index, part.width)
        if site.reader in columns:
            raise UnsupportedError(
                f"a layer must read one site; {site.reader} reads several; prune to a fixed ratio with ppf prune"
            )
        columns[site.reader] = (index, site.columns)
    return {name: Span(rows.get(name), columns.get(name)) for name in {**rows, **columns}}


def permute(layer: nn.Linear, span: Span, importance: Importance) -> None:
    """Puts the units of a layer in order, in new tensors: others may share the old ones."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if span.rows is not None:
        ids = _ids(importance.order[span.rows[0]], span.rows[1]).to(weight.device)
        weight, bias = weight[ids], None if bias is None else bias[ids]
    if span.columns is not None:
        weight = weight[:, _ids(importance.order[span.columns[0]], span.columns[1]).to(weight.device)]
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)


def _ids(order: np.ndarray, width: int) -> torch.Tensor:
    """Element ids of units of ``width`` elements; Int[U] -> Int[U * width]."""
    return torch.from_numpy((order[:, None] * width + np.arange(width)).ravel())


def prefix_of(layer: nn.Linear, span: Span, kept: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Views of the weight and the bias of a layer when Int[S] units stay."""
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if span.rows is not None:
        rows = running_units(int(kept[span.rows[0]])) * span.rows[1]
        weight, bias = weight[:rows], None if bias is None else bias[:rows]
    if span.columns is not None:
        columns = running_units(int(kept[span.columns[0]])) * span.columns[1]
        if not kept[span.columns[0]]:
            return weight.new_zeros(()).expand(len(weight), columns), None
        weight = weight[:, :columns]
    return weight, bias


def running_units(kept: int) -> int:
    """How many units of a site run, and are in a cache, when ``kept`` of them stay."""
    return max(kept, 1)
