"""Nested policies: what is gone at one ratio is gone at every larger one, as a live model wants that changes its ratio.

A chain is an order in which chunks go. Whatever the order, its policies are nested. Inference alone, in numpy.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ppf.artifact import load_artifact, save_artifact
from ppf.errors import MEND, DamagedError, InputError
from ppf.space.budget import aligned_floors, unit_steps
from ppf.space.layout import Layout


@dataclass(frozen=True, eq=False)
class Chain:
    """An order in which everything above the floors goes.

    Attributes:
        order: Int[C], the site that loses its next chunk.
        chunks: Int[S], units of a chunk; the last one of a site may be smaller.
        layout: Of the dense model.
    """

    order: np.ndarray
    chunks: np.ndarray
    layout: Layout

    @cached_property
    def _due(self) -> np.ndarray:
        """Int[C + 1, S]: units that would be gone after so many chunks if there were no floors."""
        steps: np.ndarray = np.zeros((len(self.order) + 1, len(self.chunks)), dtype=np.int64)
        steps[np.arange(1, len(self.order) + 1), self.order] = 1
        return steps.cumsum(axis=0) * self.chunks

    def kept(self, remove: np.ndarray, align: int = 1, tp: int = 1) -> np.ndarray:
        """Int[N, S]: what stays when Int[N] parameters go, or a little more.

        The budget is met to within one step (see ``unit_steps``) of the site that loses last: a channel or a KV group, or
        ``align`` and ``tp`` of them. Policies of one ``align`` and ``tp`` are nested, those of different ones need not be.

        Raises:
            InputError: More than the floors allow.
        """
        layout, remove = self.layout, np.asarray(remove)
        steps, floors = unit_steps(layout, align, tp), aligned_floors(layout, align, tp)
        gone = np.minimum(self._due, layout.units - floors)
        states = np.where(gone == 0, layout.units, (layout.units - gone) // steps * steps)
        spent = (layout.units - states) @ layout.costs
        if (remove > spent[-1]).any():
            raise InputError(f"a chain removes at most {spent[-1]:,} parameters; {int(remove.max()):,} were asked; ask for less")
        whole = np.asarray(np.searchsorted(spent, remove))
        kept, rows = states[np.maximum(whole - 1, 0)], np.flatnonzero(whole)
        site = self.order[whole[rows] - 1]
        needed = -(-(remove[rows] - spent[whole[rows] - 1]) // layout.costs[site])
        kept[rows, site] = (kept[rows, site] - needed) // steps[site] * steps[site]
        return kept

    def save(self, path: Path) -> None:
        """Writes the artefact."""
        save_artifact(path, "nested", self.layout.fingerprint, {"order": self.order, "chunks": self.chunks})

    @classmethod
    def load(cls, path: Path, layout: Layout) -> "Chain":
        """Reads the artefact.

        Raises:
            DamagedError: Not whole, or of another model.
        """
        arrays, _ = load_artifact(path, "nested", layout.fingerprint)
        try:
            order: np.ndarray = arrays["order"].astype(np.int64)
            chunks: np.ndarray = arrays["chunks"].astype(np.int64)
            free = layout.units - layout.floors
            if chunks.shape != free.shape or (chunks < 1).any() or not np.array_equal(np.sort(order), whole_order(free, chunks)):
                raise ValueError("an order in which not everything goes once")
        except (KeyError, ValueError) as error:
            raise DamagedError(f"{path} must hold nested policies; {error!r} came; {MEND}") from error
        return cls(order, chunks, layout)


def whole_order(free: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """Int[C], sorted: each site as often as it has chunks; of Int[S] units above the floors and Int[S] units a chunk."""
    return np.repeat(np.arange(len(free)), -(-free // chunks))
