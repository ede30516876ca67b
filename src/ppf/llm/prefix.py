"""Prefixes of layers: how the units of a site lie in them, and the layer that uses as much of itself as its thread says.

writer   ████████░░░░        rows [:k]                      reader   ████████░░░░   columns [:k]
fused    ████░░████░░██░     rows [:k] of every block       norm     ████████░░░░   entries [:k]
         kept, not read                                              kept, not read

A site that keeps nothing runs its first unit, which no code of any family can do without, into a reader of zeros.
Routers choose among the experts that keep one.
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ppf.errors import UnsupportedError
from ppf.llm.architectures import counters_of, linear
from ppf.llm.experts import routers
from ppf.llm.norms import choose_among
from ppf.space.allocation import Allocation
from ppf.space.importance import Importance
from ppf.space.layout import Layout, Rows, Site

Part = tuple[torch.Tensor, torch.Tensor | None]
"""A weight and its bias, if it has one."""


@dataclass(frozen=True, eq=False)
class View:
    """The model at one allocation: views of its tensors, no memory of their own.

    Attributes:
        allocation: Int[S] kept units.
        tensors: Of every layer that a site touches its blocks of rows, one behind the other; one block if all of them run.
        chosen: By path of each router that loses an expert, the numbers of those that stay.
    """

    allocation: Allocation
    tensors: tuple[tuple[Part, ...], ...]
    chosen: dict[str, list[int]]


@dataclass(frozen=True)
class Span:
    """Which site numbers the rows and the columns of a layer; None: they all stay.

    Attributes:
        rows: The site, and of each block of rows how many a unit has.
        columns: The site, and how many columns a unit has.
    """

    rows: tuple[int, tuple[int, ...]] | None = None
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
        first, *more = self.running.view.tensors[self.index]
        output = functional.linear(input, *first)
        return torch.cat([output, *(functional.linear(input, *part) for part in more)], -1) if more else output


def follow(model: PreTrainedModel, layout: Layout, spans: dict[str, Span], running: Running) -> None:
    """Lets every layer of the spans, what counts heads, and routers follow what their thread says. The model is changed."""
    for index, name in enumerate(spans):
        layer = model.get_submodule(name)
        if isinstance(layer, nn.Linear):
            model.set_submodule(name, PrefixLinear(layer, index, running))
        else:  # a norm: its own code, with as many entries as run
            _ask(layer, "weight", partial(_entries, running, index))
    for index, site in enumerate(layout.sites):
        for owner, holder, name, per_unit in counters_of(model, layout.model_type, site):
            if holder:  # a config, which other layers share
                setattr(owner, holder, copy.copy(getattr(owner, holder)))
            counter = getattr(owner, holder) if holder else owner
            _ask(counter, name, partial(_heads, running, index, per_unit))
    for path in routers((site, site.floor) for site in layout.sites):
        model.get_submodule(path).register_forward_hook(partial(_choose, running, path))


def _entries(running: Running, index: int) -> torch.Tensor:
    return running.view.tensors[index][0][0]


def _heads(running: Running, site: int, per_unit: int) -> int:
    return per_unit * running_units(int(running.view.allocation.kept[site]))


def _choose(running: Running, path: str, router: nn.Module, inputs: tuple[torch.Tensor, ...], output: Any) -> Any:
    stays = running.view.chosen.get(path)
    return output if stays is None else choose_among(stays)(router, inputs, output)


def _ask(owner: Any, name: str, value: Callable[[], Any]) -> None:
    """Makes an attribute of one object a question that every thread gets its own answer to."""
    kind = type(owner)
    owner.__class__ = type(kind.__name__, (kind,), {name: property(lambda _: value()), "__doc__": kind.__doc__})


def spans_of(model: PreTrainedModel, layout: Layout) -> dict[str, Span]:
    """By name of a layer what the sites number in it.

    Raises:
        UnsupportedError: Units that no prefix of a layer, or of its blocks, can hold.
    """
    rows: dict[str, tuple[int, tuple[int, ...]]] = {}
    columns: dict[str, tuple[int, int]] = {}
    for index, site in enumerate(layout.sites):
        for name, parts in _by_module(site).items():
            widths = tuple(part.width for part in parts)
            starts = [site.units * before for before in accumulate(widths, initial=0)]
            is_norm = any(part.module == name for part in site.norms)
            size = len(model.get_submodule(name).weight) if is_norm else linear(model, name).out_features
            if name in rows or [*(part.offset for part in parts), size] != starts:
                raise UnsupportedError(
                    f"every row of a layer must belong to a unit of one site, in whole blocks; in {name} of this "
                    f"{layout.model_type} model it does not; prune it to a fixed ratio with ppf prune"
                )
            rows[name] = (index, widths)
        linear(model, site.reader)  # refuses what is none
        if site.reader in columns:
            raise UnsupportedError(
                f"a layer must read one site; {site.reader} reads several; prune to a fixed ratio with ppf prune"
            )
        columns[site.reader] = (index, site.columns)
    return {name: Span(rows.get(name), columns.get(name)) for name in {**rows, **columns}}


def _by_module(site: Site) -> dict[str, list[Rows]]:
    found: dict[str, list[Rows]] = {}
    for part in (*site.writers, *site.norms):
        found.setdefault(part.module, []).append(part)
    return found


def permute(layer: nn.Module, span: Span, importance: Importance) -> Part:
    """Puts the units of a layer in order, in new tensors: others may share the old ones.

    Returns:
        The whole of its weight and its bias.
    """
    held: Any = getattr(layer, "bias", None)
    weight, bias = layer.get_parameter("weight").detach(), None if held is None else held.detach()
    if span.rows is not None:
        order, widths = importance.order[span.rows[0]], span.rows[1]
        starts = accumulate((len(order) * width for width in widths), initial=0)
        ids = torch.cat([start + _ids(order, width) for start, width in zip(starts, widths, strict=False)]).to(weight.device)
        weight, bias = weight[ids], None if bias is None else bias[ids]
    if span.columns is not None:
        weight = weight[:, _ids(importance.order[span.columns[0]], span.columns[1]).to(weight.device)]
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias, requires_grad=False)
    return weight, bias


def _ids(order: np.ndarray, width: int) -> torch.Tensor:
    """Element ids of units of ``width`` elements; Int[U] -> Int[U * width]."""
    return torch.from_numpy((order[:, None] * width + np.arange(width)).ravel())


def prefix_of(whole: Part, span: Span, kept: np.ndarray) -> tuple[Part, ...]:
    """Views of the weight and the bias of a layer when Int[S] units stay, block by block."""
    weight, bias = whole
    parts = [whole]
    if span.rows is not None:
        widths, runs = span.rows[1], running_units(int(kept[span.rows[0]]))
        units = len(weight) // sum(widths)
        if runs < units:
            starts = accumulate((units * width for width in widths), initial=0)
            blocks = [slice(start, start + runs * width) for start, width in zip(starts, widths, strict=False)]
            parts = [(weight[block], None if bias is None else bias[block]) for block in blocks]
    if span.columns is not None:
        has, count = kept[span.columns[0]], running_units(int(kept[span.columns[0]])) * span.columns[1]
        if not has:
            parts = [(one.new_zeros(()).expand(len(one), count), None) for one, _ in parts]
        else:
            parts = [(one[:, :count], other) for one, other in parts]
    return tuple(parts)


def running_units(kept: int) -> int:
    """How many units of a site run, and are in a cache, when ``kept`` of them stay."""
    return max(kept, 1)
