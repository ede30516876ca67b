"""Progress of long work: live bars on a terminal, plain lines elsewhere, nothing when quiet. Written to standard error.

[ 6/18] measuring probes   ━━━━━━━━━╸━━━━━━━━━━  41/96  0:00:34  1.2/s  0:00:46 left  best ...
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

Advance = Callable[..., None]
"""Called once per finished item, with an optional note such as the best value so far."""
_LINE_EVERY = 15.0
_WIDE = 110
_RECENT = 64
"""Items over which the rate is taken: what was at hand at the start, and came at once, must not count for long."""


class Progress:
    """Shows stages of work.

    Args:
        quiet: Show nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self._quiet = quiet
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._plan: list[str] = []
        self._bars: Bars | None = None

    def plan(self, names: Sequence[str]) -> None:
        """Says which stages are to come, so that each can show where it stands; some may be left out, or others come between."""
        self._plan = list(names)

    def say(self, line: str) -> None:
        """One line."""
        if not self._quiet:
            self._console.print(line, markup=False)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Advance]:
        """A named piece of work of ``total`` items; its wall time is added to ``seconds``. A stage may lie within another.

        Yields:
            The function that counts an item.
        """
        start = time.perf_counter()
        try:
            if self._quiet:
                yield lambda note="": None
            elif self._console.is_terminal:
                with self._bar(self._titled(name), total) as advance:
                    yield advance
            else:
                lines = _Lines(self._console, self._titled(name), total, start)
                yield lines.advance
                lines.end()
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def _titled(self, name: str) -> str:
        """The name, and which of how many it is, if that is known."""
        return f"[{self._plan.index(name) + 1}/{len(self._plan)}] {name}" if name in self._plan else name

    @contextmanager
    def _bar(self, name: str, total: int | None) -> Iterator[Advance]:
        outermost = self._bars is None
        if self._bars is None:
            self._bars = Bars(*_columns(self._console.width), console=self._console)
            self._bars.start()
        bars = self._bars
        task = bars.add_task(name, total=total, note="")
        try:
            yield lambda note="": bars.update(task, advance=1, note=note)
            if total is None:
                bars.update(task, total=1, completed=1)
        finally:
            if outermost:
                bars.stop()
                self._bars = None
            else:
                bars.remove_task(task)


def _columns(width: int) -> list[ProgressColumn]:
    """What a terminal of so many characters has room for; only the note gives way where it is not enough."""
    wide, firm = width >= _WIDE, Column(no_wrap=True)
    name = TextColumn("{task.description:<25}", markup=False, table_column=firm)
    elapsed = [TimeElapsedColumn(firm)] if wide else []
    left = TimeRemainingColumn(table_column=firm)
    return [
        name,
        BarColumn(24 if wide else 6, table_column=firm),
        MofNCompleteColumn(table_column=firm),
        *elapsed,
        _Rate(firm),
        left,
        _Note(),
    ]


class _Note(ProgressColumn):
    """Such as the best value so far, on one line."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["note"], no_wrap=True, overflow="ellipsis")


class _Rate(ProgressColumn):
    """Items a second or a minute."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(_rate(speed) if speed and task.total and task.total > 1 else "", style="progress.data.speed")


class _Lines:
    """A stage where there is no terminal: a line at its start, one every fifteen seconds, and one at the end of a long one."""

    def __init__(self, console: Console, name: str, total: int | None, start: float) -> None:
        self._console, self._name, self._total = console, name, total
        self._count, self._start, self._last, self._note = 0, start, start, ""
        self._times = deque([start], maxlen=_RECENT)
        self._print("...", " ")

    def advance(self, note: str = "") -> None:
        """Counts an item."""
        now = time.perf_counter()
        self._count, self._note = self._count + 1, note
        self._times.append(now)
        if now - self._last < _LINE_EVERY or not self._total or self._count >= self._total:
            return
        self._last = now
        rate = (len(self._times) - 1) / max(now - self._times[0], 1e-9)
        left = (self._total - self._count) / rate
        self._print(f"{self._count} of {self._total}, {_rate(rate)}, about {left:.0f} s left  {note}".rstrip())

    def end(self) -> None:
        """Says how long it took, if that was long."""
        took = time.perf_counter() - self._start
        if took >= _LINE_EVERY:
            self._print(f"done in {took:.0f} s  {self._note}".rstrip())

    def _print(self, words: str, mark: str = ": ") -> None:
        self._console.print(f"{self._name}{mark}{words}", markup=False)
        sys.stderr.flush()


def _rate(speed: float) -> str:
    return f"{speed:.1f}/s" if speed >= 1 else f"{60 * speed:.1f}/min"
