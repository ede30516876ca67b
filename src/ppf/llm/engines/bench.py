"""What every engine promises, a dense model on the bench, and the engine that measures in this process."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from transformers import PreTrainedModel

from ppf.errors import ResourceError
from ppf.llm.masking import masked, narrowed
from ppf.llm.perplexity import Reference, measure, reference_of
from ppf.llm.placement import is_spread
from ppf.llm.shared_layers import SharedLayers
from ppf.llm.text import Text
from ppf.samples import Measurement
from ppf.space.layout import Layout
from ppf.space.mask import Mask


class Engine(Protocol):
    """Measures masks of one model on one text."""

    def measure(
        self, masks: Sequence[Mask], part: str = "search", rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Measurement]]:
        """Measures masks on a part of the text.

        Args:
            masks: Which units stay.
            part: ``"search"``, ``"validation"`` or ``"test"``.
            rows: Only these blocks of the part.

        Yields:
            (Index into ``masks``, result) as results come, each index once; a failure is a result with a reason.
        """
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


class Bench:
    """A dense model, its text, and its answers on each part, which are computed when they are first needed.

    Args:
        model: The dense model, in the dtype to measure in.
        layout: Its layout.
        text: What to measure on.
        tokens_per_batch: How many tokens go through the model at once.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, text: Text, tokens_per_batch: int) -> None:
        self._model, self._layout, self._text, self._batch = model, layout, text, tokens_per_batch
        self._references: dict[str, Reference] = {}
        self._shared = SharedLayers(model, layout, text.search.size)
        # Arithmetic is what a CPU is short of, memory what an accelerator is.
        self._pruned = narrowed if model.device.type == "cpu" and not is_spread(model) else masked

    def prepare(self, part: str) -> Reference:
        """The dense model's answers on a part."""
        if part not in self._references:
            # Only the search text is measured with masks that leave whole layers alone.
            with self._shared.kept() if part == "search" else contextlib.nullcontext():
                self._references[part] = reference_of(self._model, getattr(self._text, part), self._batch)
        return self._references[part]

    def measure(self, mask: Mask, part: str, rows: Sequence[int] | None) -> Measurement:
        """Runs the masked model over the blocks; too little memory is a result with a reason."""
        start = time.perf_counter()
        blocks = getattr(self._text, part)
        try:
            reference = self.prepare(part)
            if rows is not None:
                blocks, reference = blocks[list(rows)], reference.of(rows)
            with self._pruned(self._model, self._layout, mask), self._shared.skipped(mask):
                losses, divergences = measure(self._model, blocks, reference, self._batch)
        except ResourceError as error:
            return Measurement(math.nan, math.nan, 0, time.perf_counter() - start, str(error))
        seconds = time.perf_counter() - start
        each = tuple(losses.tolist()), tuple(divergences.tolist())
        return Measurement(float(losses.mean()), float(divergences.mean()), blocks.size, seconds, "", *each)


class InProcessEngine:
    """Measures here: for accelerators, and for models that exist only as objects. Arguments as in ``Bench``."""

    def __init__(self, model: PreTrainedModel, layout: Layout, text: Text, tokens_per_batch: int) -> None:
        self._bench = Bench(model, layout, text, tokens_per_batch)
        self._bench.prepare("search")

    def measure(
        self, masks: Sequence[Mask], part: str = "search", rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Measurement]]:
        """See ``Engine``."""
        for index, mask in enumerate(masks):
            yield index, self._bench.measure(mask, part, rows)

    def close(self) -> None:
        """See ``Engine``."""
