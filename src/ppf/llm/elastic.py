"""The elastic model: one dense copy in memory that runs at any allocation, each request at its own, without copying a weight.

The units of every site are put in order of importance once, which changes nothing of what the model computes. From then on
every allocation is a prefix, so a model of another size is another set of views of the same tensors:

    writer   ████████░░░░  rows [:k]        reader   ████████░░░░  columns [:k]
             kept    not read                        kept    not read

A linear layer reads which views it shall use from a slot of its thread. Nothing that threads share is ever changed by a
request, so requests of different ratios run side by side.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import Cache, PreTrainedModel

from ppf.errors import InputError, UnsupportedError
from ppf.llm.architectures import linear
from ppf.space.allocation import Allocation
from ppf.space.importance import Importance, check_units
from ppf.space.layout import Layout

Carried = Literal["kept", "narrowed", "rebuild"]


@dataclass(frozen=True, eq=False)
class View:
    """The model at one allocation: views of its tensors, no memory of their own.

    Attributes:
        allocation: Int[S] kept units.
        tensors: Of every layer that a site touches its weight and its bias, if it has one.
    """

    allocation: Allocation
    tensors: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]


class ElasticModel:
    """A model whose size can be changed while it runs.

    It takes the model over: units change places and linear layers are replaced. A model that shares tensors with the given
    one stays as it is.

    Args:
        model: The dense model, in evaluation mode.
        layout: Its layout.
        importance: The order of its units.
        decide: From a ratio to an allocation, for ``set_ratio``.

    Raises:
        UnsupportedError: Units that no prefix of a tensor can hold, as where one layer writes queries, keys and values.
        DamagedError: The importance is of another model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layout: Layout,
        importance: Importance,
        decide: Callable[[float], Allocation] | None = None,
    ) -> None:
        check_units(importance.scores, layout.units, "importance")
        self.layout, self._model, self._decide = layout, model, decide
        self._spans = _spans(model, layout)
        for name, span in self._spans.items():
            _permute(linear(model, name), span, importance)
        self._layers = [linear(model, name) for name in self._spans]
        dense = self.view(Allocation(layout.units))
        self._running = _Running(dense)
        for index, (name, layer) in enumerate(zip(self._spans, self._layers, strict=True)):
            model.set_submodule(name, _PrefixLinear(layer, index, self._running))
        self.current = dense
        """What runs where nothing else is said; replaced as a whole, never changed."""

    @property
    def config(self) -> Any:
        """Of the dense model."""
        return self._model.config

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self._model.device

    def view(self, allocation: Allocation) -> View:
        """The model at an allocation; to be kept by whoever runs it more than once.

        Raises:
            InputError: Another number of sites, or units below a floor or above what there is.
        """
        kept, layout = allocation.kept, self.layout
        if kept.shape != layout.units.shape or (kept < layout.floors).any() or (kept > layout.units).any():
            raise InputError("an allocation must lie between the floors and the units of this model; another came; use its own")
        spans = zip(self._layers, self._spans.values(), strict=True)
        return View(allocation, tuple(_prefix(layer, span, kept) for layer, span in spans))

    def set_allocation(self, allocation: Allocation) -> View:
        """What runs from now on where a caller says nothing else; requests under way end as they began."""
        self.current = self.view(allocation)
        return self.current

    def set_ratio(self, ratio: float) -> View:
        """``set_allocation`` by a ratio in [0, 1).

        Raises:
            InputError: More than the floors allow, or nobody to decide.
        """
        if self._decide is None:
            raise InputError("a ratio must come to a model with a decider; this one has none; give decide= or an allocation")
        return self.set_allocation(self._decide(ratio))

    @contextmanager
    def at(self, view: View | None = None) -> Iterator[PreTrainedModel]:
        """Runs the model at one allocation in this thread, whatever other threads do.

        Args:
            view: Of this model; by default ``current``, as it is when the block begins.

        Yields:
            The transformers model; its ``config`` is that of the dense one.
        """
        before, self._running.view = self._running.view, view or self.current
        try:
            yield self._model
        finally:
            self._running.view = before

    @torch.inference_mode()
    def __call__(self, **inputs: Any) -> Any:
        """One forward pass at ``current``."""
        with self.at() as model:
            return model(**inputs)

    @torch.inference_mode()
    def generate(self, **inputs: Any) -> Any:
        """transformers' ``generate``, the whole of it at the ``current`` of its beginning."""
        with self.at() as model:
            return model.generate(**inputs)

    def carry(self, cache: Cache, before: View, after: View) -> Carried:
        """Makes a KV cache fit another allocation, in place.

        Args:
            cache: Made at ``before``.
            before: Where it was made.
            after: Where it shall be used.

        Returns:
            ``"kept"`` if it fits as it is, ``"narrowed"`` if groups that are gone were dropped from it, ``"rebuild"`` if groups
            are missing: it is unchanged, and the tokens must be run again.
        """
        kept = zip(self.layout.sites, before.allocation.kept, after.allocation.kept, strict=True)
        changes = [(site.layer, int(had), int(has)) for site, had, has in kept if site.cache and had != has]
        for index, had, has in changes:
            keys = getattr(cache.layers[index], "keys", None) if index < len(cache.layers) else None
            if has > had or keys is None or keys.shape[1] != had:
                return "rebuild"
        for index, _, has in changes:
            layer: Any = cache.layers[index]
            layer.keys, layer.values = layer.keys[:, :has], layer.values[:, :has]
        return "narrowed" if changes else "kept"


@dataclass(frozen=True)
class _Span:
    """Which site numbers the rows and the columns of a layer, and how many of them a unit has; None: they all stay."""

    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None


class _Running(threading.local):
    """What runs in this thread."""

    def __init__(self, dense: View) -> None:
        self.view = dense


class _PrefixLinear(nn.Linear):
    """A linear layer that uses as much of itself as its thread says.

    Its type keeps it from being cut: the importance of its model no longer fits the order of its units.
    """

    def __init__(self, dense: nn.Linear, index: int, running: _Running) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.weight, self.bias = dense.weight, dense.bias
        self.index, self.running = index, running

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight, bias = self.running.view.tensors[self.index]
        return functional.linear(input, weight, bias)


def _spans(model: PreTrainedModel, layout: Layout) -> dict[str, _Span]:
    """By name of a layer what the sites number in it."""
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
    return {name: _Span(rows.get(name), columns.get(name)) for name in {**rows, **columns}}


def _permute(layer: nn.Linear, span: _Span, importance: Importance) -> None:
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


def _prefix(layer: nn.Linear, span: _Span, kept: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    if span.rows is not None:
        rows = int(kept[span.rows[0]]) * span.rows[1]
        weight, bias = weight[:rows], None if bias is None else bias[:rows]
    if span.columns is not None:
        weight = weight[:, : int(kept[span.columns[0]]) * span.columns[1]]
    return weight, bias
