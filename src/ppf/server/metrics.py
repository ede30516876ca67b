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
    lines: list[str] = []

    def add(name: str, kind: str, what: str, *values: tuple[str, float | None]) -> None:
        given = [(labels, value) for labels, value in values if value is not None]
        if given:
            lines.extend([f"# HELP ppf_{name} {what}", f"# TYPE ppf_{name} {kind}"])
            lines.extend(
                f"ppf_{name}{labels} {value:g}" if isinstance(value, float) else f"ppf_{name}{labels} {value}"
                for labels, value in given
            )

    add("responses_total", "counter", "Answers by HTTP status.", *((f'{{status="{key}"}}', counts[key]) for key in sorted(counts)))
    add("fits_total", "counter", "Fits of the study that policies came from.", ("", state["fits"]))
    if state["live"]:
        memory, requests = state["memory"], state["requests"]
        add("ratio", "gauge", "Pruning ratio of requests that name none.", ("", float(state["ratio"])))
        add(
            "tokens_per_second",
            "gauge",
            "Tokens a second of all requests together, over the busy part of the last 10 s.",
            ("", state["tokens_per_second"]),
        )
        add(
            "token_latency_seconds",
            "gauge",
            "Median time of a further token, of the last 10 s.",
            ("", _seconds(state["latency_ms"])),
        )
        add(
            "first_token_seconds",
            "gauge",
            "Median time from request to first token, of the last 10 s.",
            ("", _seconds(state["first_token_ms"])),
        )
        add(
            "memory_bytes",
            "gauge",
            "Bytes of the weights that are read, and of the KV caches.",
            *((f'{{kind="{key}"}}', memory[key]) for key in memory),
        )
        add("requests", "gauge", "Requests now.", *((f'{{state="{key}"}}', requests[key]) for key in ("running", "waiting")))
        ends = ("done", "failed", "refused", "cancelled")
        add("requests_total", "counter", "Requests by how they ended.", *((f'{{end="{key}"}}', requests[key]) for key in ends))
        add(
            "tokens_total",
            "counter",
            "Tokens of prompts that were run, and tokens made.",
            *((f'{{kind="{key}"}}', state["tokens"][key]) for key in state["tokens"]),
        )
    return "\n".join(lines) + "\n"


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
