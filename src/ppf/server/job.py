"""A request under way, and a size at which it may run."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ppf.decide import Decision
from ppf.llm.generate import Piece, Sampling
from ppf.llm.prefix import View
from ppf.server.room import Claim


@dataclass(frozen=True, eq=False)
class Size:
    """The live model at one ratio: a decision and the views that carry it out."""

    decision: Decision
    view: View

    @property
    def kept(self) -> np.ndarray:
        """Int[S] units."""
        return self.decision.allocation.kept


@dataclass(eq=False)
class Job:
    """One request under way.

    Attributes:
        prompt: Token ids.
        sampling: How to go on.
        size: Fixed by the request; None follows the live ratio.
        switches: Where the size changed: at which new token, from and to which ratio, and what became of the KV cache.
        view: At which its KV cache is.
        ended: What cut it before it was done: ``"time"`` or ``"shutdown"``.
        asked: When it came, by the monotonic clock.
        cancelled: Nobody waits for it any more.
        give: Hands a piece, a failure or the end to whoever waits.
        claim: What it takes of the memory.
    """

    prompt: Sequence[int]
    sampling: Sampling
    size: Size | None = None
    switches: list[dict[str, Any]] = field(default_factory=list)
    view: View | None = None
    ended: str | None = None
    asked: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    give: Callable[[Piece | Exception | None], None] = lambda _: None
    claim: Claim = field(init=False)

    def __post_init__(self) -> None:
        own = None if self.size is None else self.size.kept
        self.claim = Claim(len(self.prompt), len(self.prompt) + self.sampling.max_tokens, own)
