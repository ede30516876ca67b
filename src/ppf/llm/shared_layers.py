"""What the dense model's lower layers make of a text, kept: a mask that leaves them alone starts above them.

layer    0 ── 1 ── 2 ── 3 ── 4      the state that enters a layer is kept at some of them, as far as the memory goes
mask     =    =    =    <    <      starts at the last of these that lies below all that it removes

The figures are the same to the bit: the same operations on the same batches, once instead of once a mask. Whether a
state is there never shows in a result, so neither the order of masks nor the worker that measures one does.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.llm.architectures import stack_of
from ppf.space.layout import Layout
from ppf.space.mask import Mask

_LEAST_BYTES = 2**26
_SHARE = 16


class SharedLayers:
    """States of one dense model on the texts that it was run on while ``kept`` was open.

    Args:
        model: The dense model.
        layout: Its layout.
        tokens: How many will be run in all.
        budget: Bytes that the states may take; None for a sixteenth of the model's own, 64 MiB at least.

    Attributes:
        entries: The layers whose entering state is kept, from low to high.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, tokens: int, budget: int | None = None) -> None:
        self._model, self._layout = model, layout
        itemsize = model.dtype.itemsize
        budget = max(_LEAST_BYTES, layout.total * itemsize // _SHARE) if budget is None else budget
        room = budget // max(1, tokens * model.config.hidden_size * itemsize)
        self.entries = evenly(layout.layers, room)
        self._states: dict[bytes, dict[int, torch.Tensor]] = {}
        self._here: dict[int, torch.Tensor] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keeps the states of every batch that goes through the dense model while the block runs."""
        layers = stack_of(self._model)
        with ExitStack() as stack:
            self._watch(stack, lambda batch: self._states.setdefault(batch, {}))
            for entry in self.entries:
                stack.callback(layers[entry - 1].register_forward_hook(self._keep(entry)).remove)
            yield

    @contextmanager
    def skipped(self, mask: Mask) -> Iterator[None]:
        """Leaves out the layers below all that a mask removes while the block runs; a batch that is not kept goes through all.

        Args:
            mask: What the model is pruned to: enter this block last, it hides layers.
        """
        gone = [site.layer for site, bits in zip(self._layout.sites, mask.bits, strict=True) if not bits.all()]
        entry = max((entry for entry in self.entries if entry <= min(gone, default=self._layout.layers)), default=0)
        layers = stack_of(self._model)
        with ExitStack() as stack:
            if entry:
                self._watch(stack, lambda batch: self._states.get(batch, {}))
            for index in range(entry):
                stack.callback(layers.__setitem__, index, layers[index])
                layers[index] = _Skipped(layers[index], lambda: self._here.get(entry))
            yield

    def _watch(self, stack: ExitStack, states_of: Callable[[bytes], dict[int, torch.Tensor]]) -> None:
        """Looks up each batch before the model runs it."""

        def look(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
            self._here = states_of(inputs["input_ids"].cpu().numpy().tobytes())

        stack.callback(self._model.base_model.register_forward_pre_hook(look, with_kwargs=True).remove)

    def _keep(self, entry: int) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def keep(_: nn.Module, __: Any, output: torch.Tensor) -> None:
            self._here[entry] = output

        return keep


class _Skipped(nn.Module):
    """Stands in for a layer: hands on the state that is kept, or lets the layer work."""

    def __init__(self, layer: nn.Module, state: Callable[[], torch.Tensor | None]) -> None:
        super().__init__()
        self._layer, self._state = layer, state

    def forward(self, hidden: torch.Tensor, *others: Any, **named: Any) -> torch.Tensor:
        state = self._state()
        return self._layer(hidden, *others, **named) if state is None else state


def evenly(layers: int, room: int) -> tuple[int, ...]:
    """Where to keep states when there is room for so many: all but the first layer's, else at equal distances.

    Args:
        layers: Of the model.
        room: How many states may be kept.
    """
    count = min(room, layers - 1)
    return tuple(round(layers * number / (count + 1)) for number in range(1, count + 1))
