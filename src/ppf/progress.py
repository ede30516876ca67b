"""Progress of long work: live bars on a terminal, plain lines elsewhere, nothing when quiet. Written to standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

Advance = Callable[..., None]
"""Called once per finished item, with an optional note such as the best value so far."""
_LINE_EVERY = 15.0


class Progress:
    """Shows stages of work.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(self, line: str) -> None:
        """One line."""
        if not self._quiet:
            self._console.print(line, markup=False)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """A named piece of work of ``total`` items; its wall time is added to ``seconds``.

        Yields:
            The function that counts an item.
        """
        start = time.perf_counter()
        try:
            if self._quiet:
                yield lambda note="": None
            elif self._console.is_terminal:
                with self._bar(name, total) as advance:
                    yield advance
            else:
                yield self._lines(name, total, start)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @contextmanager
    def _bar(self, name: str, total: int | None) -> Iterator[Advance]:
        counts = [BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()]
        with Bars(TextColumn("{task.description:<22}"), *counts, TextColumn("{task.fields[note]}"), console=self._console) as bars:
            task = bars.add_task(name, total=total, note="")
            yield lambda note="": bars.update(task, advance=1, note=note)
            if total is None:
                bars.update(task, total=1, completed=1)

    def _lines(self, name: str, total: int | None, start: float) -> Advance:
        self._console.print(f"{name} ...")
        sys.stderr.flush()
        state = {"count": 0, "last": start}

        def advance(note: str = "") -> None:
            state["count"] += 1
            now = time.perf_counter()
            if now - state["last"] >= _LINE_EVERY and total:
                state["last"] = now
                left = (now - start) / state["count"] * (total - state["count"])
                self._console.print(f"{name}: {state['count']} of {total}, about {left:.0f} s left {note}".rstrip(), markup=False)

        return advance
