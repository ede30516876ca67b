"""The elastic model: one dense copy in memory that runs at any allocation, each request at its own, without copying a weight.

The units of every site are put in order of importance once, which changes nothing of what the model computes. From then on
every allocation is a prefix, so a model of another size is another set of views of the same tensors (prefix.py). A layer
reads which views it shall use from a slot of its thread. Nothing that threads share is ever changed by a request, so
requests of different ratios run side by side.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from ppf.errors import InputError, UnsupportedError
from ppf.llm.experts import routers
from ppf.llm.masking import masked
from ppf.llm.prefix import Running, View, follow, permute, prefix_of, running_units, spans_of
from ppf.space.allocation import Allocation
from ppf.space.importance import Importance, check_units
from ppf.space.layout import Layout
from ppf.space.mask import select

_TRIED = 8
_NEAR = {True: 1e-3, False: 0.25}
"""By whether it is float32, how far logits may lie apart, in their standard deviations; rounding alone makes far less."""
Carried = Literal["kept", "narrowed", "rebuild"]


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
        UnsupportedError: Units that no prefix of a tensor, or of its blocks, can hold; or a model that answers otherwise than
            the masked one when it is tried at half of its units, at its floors, and with every second site at its floor.
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
        self._spans = spans_of(model, layout)
        half = np.maximum(layout.floors, layout.units // 2)
        mixed = np.where(np.arange(len(half)) % 2, layout.floors, half)  # routers choose only where some experts stay
        expected = []
        for kept in (half, layout.floors, mixed):
            with masked(model, layout, select(Allocation(kept), importance, layout)):
                expected.append((Allocation(kept), _answer(model)))
        self._wholes = [permute(model.get_submodule(name), span, importance) for name, span in self._spans.items()]
        dense = self.view(Allocation(layout.units))
        self._running = Running(dense)
        follow(model, layout, self._spans, self._running)
        self.current = dense
        """What runs where nothing else is said; replaced as a whole, never changed."""
        for allocation, answer in expected:
            self._check(allocation, answer)

    @property
    def config(self) -> Any:
        """Of the dense model."""
        return self._model.config

    @property
    def dtype(self) -> torch.dtype:
        """In which it runs."""
        return self._model.dtype

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
        spans = zip(self._wholes, self._spans.values(), strict=True)
        chosen = routers(zip(layout.sites, map(int, kept), strict=True))
        return View(allocation, tuple(prefix_of(whole, span, kept) for whole, span in spans), chosen)

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

    def _check(self, allocation: Allocation, expected: torch.Tensor) -> None:
        """Whatever a family does with its units besides multiplying by them shows here."""
        try:
            with self.at(self.view(allocation)) as model:
                found = _answer(model)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UnsupportedError(
                f"an elastic model must run with units left out; this {self.layout.model_type} model does not: "
                f"{' '.join(str(error).split())[:120]}; prune it to a fixed ratio with ppf prune"
            ) from error
        far = float((found - expected).abs().max() / expected.std())
        if not far <= _NEAR[self._model.dtype == torch.float32]:
            raise UnsupportedError(
                f"an elastic model must answer as the masked one; logits of this {self.layout.model_type} model differ by "
                f"{far:.2g} of their spread; prune it to a fixed ratio with ppf prune"
            )

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
        counts = [(site, running_units(int(had)), running_units(int(has))) for site, had, has in kept if site.cache]
        changes = [(site.layer, had, has) for site, had, has in counts if had != has]
        for index, had, has in changes:
            keys = getattr(cache.layers[index], "keys", None) if index < len(cache.layers) else None
            if has > had or keys is None or keys.shape[1] != had:
                return "rebuild"
        for index, _, has in changes:
            layer: Any = cache.layers[index]
            layer.keys, layer.values = layer.keys[:, :has], layer.values[:, :has]
        return "narrowed" if changes else "kept"


@torch.inference_mode()
def _answer(model: PreTrainedModel) -> torch.Tensor:
    """Float[L, V] logits of a few tokens."""
    ids = torch.arange(min(_TRIED, model.config.vocab_size), device=model.device)[None]
    return model(input_ids=ids, use_cache=False).logits[0].float()
