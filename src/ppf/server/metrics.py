"""What is measured while the model runs, and how Prometheus reads it."""

import statistics
import time
from collections import Counter, deque
from collections.abc import Mapping
from typing import Any

_RECENT = 10.0
_KEPT = 4096


class Meter:
    """Counts and recent times; threads add to it, others read.

    Attributes:
        counts: Requests by how they ended, and tokens by kind.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._first: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        self._steps: deque[tuple[float, float, float]] = deque(maxlen=_KEPT)

    def note_first(self, seconds: float) -> None:
        """A first token came, so long after its request."""
        self._first.append((time.monotonic(), seconds))

    def note_step(self, seconds: float, ratio: float) -> None:
        """A further token took so long, at that ratio."""
        self._steps.append((time.monotonic(), seconds, ratio))

    @property
    def times(self) -> list[tuple[float, float]]:
        """Ratio and milliseconds of each token of the last seconds."""
        return [(ratio, 1e3 * seconds) for _, seconds, ratio in self._recent()]

    @property
    def latency_ms(self) -> float | None:
        """Median of the last seconds; None if nothing ran."""
        recent = self._recent()
        return 1e3 * statistics.median(seconds for _, seconds, _ in recent) if recent else None

    @property
    def first_token_ms(self) -> float | None:
        """Median of the last seconds, from the request on; None if nothing began."""
        since = time.monotonic() - _RECENT
        recent = [seconds for at, seconds in self._first.copy() if at > since]
        return 1e3 * statistics.median(recent) if recent else None

    @property
    def tokens_per_second(self) -> float:
        """Of all requests together, over the part of the last seconds in which at least one ran."""
        busy, until = 0.0, 0.0
        recent = self._recent()
        for at, seconds, _ in recent:  # steps of several requests overlap
            busy += max(0.0, at - max(until, at - seconds))
            until = max(until, at)
        return len(recent) / busy if busy else 0.0

    def _recent(self) -> list[tuple[float, float, float]]:
        since = time.monotonic() - _RECENT
        return [step for step in self._steps.copy() if step[0] > since]


def prometheus(state: dict[str, Any], counts: Mapping[int, int]) -> str:
    """The text that Prometheus scrapes; docs/api.md lists it, and a test holds both to each other.

    Args:
        state: As /api/state has it; without a live model only its requests.
        counts: Answers by status.
    """
    answers = {f'{{status="{key}"}}': counts[key] for key in sorted(counts)}
    lines = _lines("responses_total", "counter", "Answers by HTTP status.", answers)
    lines += _lines("fits_total", "counter", "Fits of the study that policies came from.", {"": state["fits"]})
    for name, kind, what, values in _of_live(state) if state["live"] else ():
        lines += _lines(name, kind, what, values)
    return "\n".join(lines) + "\n"


def _of_live(state: dict[str, Any]) -> list[tuple[str, str, str, dict[str, float | None]]]:
    """Name, kind, meaning and values by labels of what a live model has beside."""
    busy, first = _seconds(state["latency_ms"]), _seconds(state["first_token_ms"])
    together = "Tokens a second of all requests together, over the busy part of the last 10 s."
    memory = {f'{{kind="{key}"}}': value for key, value in state["memory"].items()}
    now = {f'{{state="{key}"}}': state["requests"][key] for key in ("running", "waiting")}
    ends = {f'{{end="{key}"}}': state["requests"][key] for key in ("done", "failed", "refused", "cancelled")}
    tokens = {f'{{kind="{key}"}}': value for key, value in state["tokens"].items()}
    return [
        ("ratio", "gauge", "Pruning ratio of requests that name none.", {"": float(state["ratio"])}),
        ("tokens_per_second", "gauge", together, {"": state["tokens_per_second"]}),
        ("token_latency_seconds", "gauge", "Median time of a further token, of the last 10 s.", {"": busy}),
        ("first_token_seconds", "gauge", "Median time from request to first token, of the last 10 s.", {"": first}),
        ("memory_bytes", "gauge", "Bytes of the weights that are read, and of the KV caches.", memory),
        ("requests", "gauge", "Requests now.", now),
        ("requests_total", "counter", "Requests by how they ended; an answer that the time limit cut is done.", ends),
        ("tokens_total", "counter", "Tokens of prompts that were run, and tokens made.", tokens),
    ]


def _lines(name: str, kind: str, what: str, values: Mapping[str, float | None]) -> list[str]:
    """Nothing for a metric that has no value yet."""
    given = [f"ppf_{name}{at} {_shown(value)}" for at, value in values.items() if value is not None]
    return [f"# HELP ppf_{name} {what}", f"# TYPE ppf_{name} {kind}", *given] if given else []


def _shown(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
