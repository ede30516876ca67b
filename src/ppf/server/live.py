"""The live model: an elastic model that answers many requests, each in a thread, each at its own ratio or at the live one."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from ppf.config import Target
from ppf.decide import Decider
from ppf.errors import InputError, ResourceError
from ppf.llm.elastic import ElasticModel
from ppf.llm.generate import Piece, generate
from ppf.llm.perplexity import is_memory
from ppf.llm.prefix import View, running_units
from ppf.llm.timing import step_seconds
from ppf.provenance import cores
from ppf.server.controller import Costs, Load
from ppf.server.job import Job, Size
from ppf.server.metrics import Meter
from ppf.server.room import Room
from ppf.server.turns import NO_ROOM, Turns
from ppf.server.wire import Refusal
from ppf.space.budget import largest_ratio

_RUNNING = 4
_WAITING = 32
_SECONDS = 300.0
_LEAST_TOKENS = 32
"""That a goal of memory must leave room for: a short question and its answer."""
_TIMED = 6


class Live:
    """An elastic model that answers requests.

    Args:
        decider: Of the study.
        elastic: Its model.
        tokenizer: Of the model.
        ratio: To start with.
        nested: Whether decisions are nested.
        timing_seconds: About how long timing several sizes may take.

    Raises:
        InputError: A ratio beyond what the floors allow.
    """

    def __init__(
        self,
        decider: Decider,
        elastic: ElasticModel,
        tokenizer: PreTrainedTokenizerBase,
        ratio: float = 0.0,
        nested: bool = False,
        timing_seconds: float = 1.5,
    ) -> None:
        self.decider, self.elastic, self.tokenizer, self.nested = decider, elastic, tokenizer, nested
        self.context = int(elastic.config.max_position_embeddings)
        self.meter = Meter()
        self.room = Room(self._weights, self._kv_bytes)
        self.turns = Turns(self.room, lambda: self.size.kept)
        self.size = self.set_ratio(ratio)
        sizes = self._sizes(decider)
        seconds = step_seconds(self.elastic, [size.view for size in sizes], timing_seconds)
        ratios, latency = [self.ratio_of(size.view) for size in sizes], 1e3 * np.minimum.accumulate(seconds)
        self.costs = self._costs(sizes, lambda ratio: float(np.interp(ratio, ratios, latency)))
        self._jobs: set[Job] = set()
        self._closed = False
        self._workers = min(_RUNNING, cores())
        self._pool = ThreadPoolExecutor(self._workers, thread_name_prefix="ppf-live")

    def size_for(self, ratio: float) -> Size:
        """The decision for a ratio and its views.

        Raises:
            InputError: Not a ratio, or more than the floors allow.
        """
        return self._size(self.decider, ratio)

    def adopt(self, decider: Decider, ratio: float | None = None, memory: int | None = None, high: float = 0.0) -> None:
        """Decides by another fit of the same model from now on; a size that a request under way has fixed stays.

        Args:
            decider: Of the other fit.
            ratio: That runs from now on; None keeps the ratio, as far as the floors allow.
            memory: As ``keep_within`` has it.
            high: The largest ratio there.

        Raises:
            InputError: Another model, or another order of its units than that in memory; or as ``keep_within``.
            ResourceError: Requests under way may take more than its largest ratio has room for.
        """
        old, new = self.decider, decider
        same = old.study.record["model"]["digest"] == new.study.record["model"]["digest"]
        same = same and old.layout.fingerprint == new.layout.fingerprint
        orders = zip(old.importance.order, new.importance.order, strict=same)
        if not same or not all(np.array_equal(one, other) for one, other in orders):
            raise InputError(
                "a study fitted anew must keep its model and the order of the units; it has another; start the server again"
            )
        asked = min(self.size.decision.asked, largest_ratio(new.layout)) if ratio is None else ratio
        size, costs = self._size(new, asked), self._costs(self._sizes(new), self.costs.latency_at)  # other threads may decide
        room = self._room_within(memory, high, new)  # meanwhile: by the old fit, until all of the new one is there
        if not room.can_finish():
            raise ResourceError(
                "requests under way must have room at the new fit's largest ratio; they may take more; some have to end first"
            )
        self.decider, self.costs = new, costs
        self.room.goal, self.room.top = room.goal, room.top
        self.run_at(size)

    def set_ratio(self, ratio: float) -> Size:
        """Changes what runs where a request names no ratio, requests under way included."""
        return self.run_at(self.size_for(ratio))

    def run_at(self, size: Size) -> Size:
        """``set_ratio`` with a size at hand."""
        self.size, self.elastic.current = size, size.view
        return size

    def keep_within(self, memory: int | None, ratio: float) -> None:
        """Lets requests run only while weights in use and KV caches fit, at this largest ratio; None: whatever they take.

        Raises:
            InputError: Not even a short request would have room.
        """
        room = self._room_within(memory, ratio, self.decider)
        self.room.goal, self.room.top = room.goal, room.top

    def admit(self, job: Job) -> None:
        """Gives a job its place among those that run or wait; ``leave`` takes it away.

        Raises:
            Refusal: Too many wait, or the server stops.
        """
        if self._closed or len(self._jobs) >= self._workers + _WAITING:
            self.meter.counts["refused"] += 1
            most = f"at most {self._workers + _WAITING} requests may run or wait; more came"
            must = "the server must go on; it stops" if self._closed else most
            raise Refusal(503, f"{must}; try again later", "busy")
        self._jobs.add(job)

    def leave(self, job: Job) -> None:
        """Takes a job's place away, and ends it if it still runs."""
        job.cancelled.set()
        self._jobs.discard(job)

    async def pieces(self, job: Job) -> AsyncIterator[Piece]:
        """Runs an admitted job in a thread. It ends early, without a last piece, when its time is up or the server stops.

        Raises:
            Refusal: There is not enough memory.
        """
        queue: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()
        loop, end = asyncio.get_running_loop(), "cancelled"

        def give(item: Piece | Exception | None) -> None:
            with contextlib.suppress(RuntimeError):  # the server has stopped
                loop.call_soon_threadsafe(queue.put_nowait, item)

        job.give = give
        try:
            self._pool.submit(self._work, job)
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    end = "refused" if isinstance(item, Refusal) else "failed"
                    raise _as_ours(item) from item
                end = "done" if item.finish else end
                yield item
            end = "done" if job.ended == "time" else end  # its answer is delivered
        finally:
            self.leave(job)
            self.meter.counts[end] += 1

    def load(self, is_timed: bool = True) -> Load:
        """What the controller looks at; its slowdown is 1 where times are none of its goals."""
        return self.room.load(self.costs.slowdown(self.meter.times) if is_timed else 1.0)

    def learn(self) -> None:
        """Lets costs that were timed on a busy machine come down to what is seen."""
        self.costs = self.costs.learned(self.meter.times)

    def state(self) -> dict[str, Any]:
        """A JSON-ready record of what runs."""
        jobs, counts, decision = list(self._jobs), self.meter.counts, self.size.decision
        weights, caches = self.room.in_use(self.size.kept)
        return {
            "ratio": decision.asked,
            "met": decision.met,
            "nested": self.nested,
            "tokens_per_second": self.meter.tokens_per_second,
            "latency_ms": self.meter.latency_ms,
            "first_token_ms": self.meter.first_token_ms,
            "memory": {
                "weights": weights,
                "kv_cache": caches,
            },
            "requests": {"running": len(self.room.running), "waiting": sum(job.claim.kept is None for job in jobs)}
            | {end: counts[end] for end in ("done", "failed", "refused", "cancelled")},
            "tokens": {kind: counts[f"{kind}_tokens"] for kind in ("prompt", "completion")},
            "context": self.context,
        }

    def close(self) -> None:
        """Ends what runs or waits, and takes nothing more."""
        self._closed = True
        for job in list(self._jobs):
            job.ended = "shutdown"
            job.cancelled.set()
            job.give(None)  # one that waits has no thread that could
        self._pool.shutdown(wait=False, cancel_futures=True)

    def ratio_of(self, view: View) -> float:
        """The share of the prunable parameters that a view leaves out."""
        return float(self.decider.layout.ratio(view.allocation.kept))

    def _work(self, job: Job) -> None:
        try:
            if self.turns.enter(job):
                self._run(job)
        except Exception as error:  # the waiting side tells the client
            job.give(error)
        finally:
            self.turns.leave(job)
            job.give(None)

    def _run(self, job: Job) -> None:
        start, ratio = time.monotonic(), 0.0
        self.meter.counts["prompt_tokens"] += len(job.prompt)
        pieces = generate(self.elastic, self.tokenizer, job.prompt, job.sampling, lambda: self._view_for(job))
        while not job.cancelled.is_set():
            if time.monotonic() - start >= _SECONDS:
                job.ended = "time"
                break
            if not self.turns.may_go_on(job):
                continue
            piece = next(pieces)
            if piece.view is not job.view:
                ratio = self._note_view(job, piece)
            if piece.carried is None:
                self.meter.note_first(time.monotonic() - job.asked)
            elif piece.carried != "rebuild":
                self.meter.note_step(piece.seconds, ratio)
            if not piece.finish:  # the last needs no more room, and waits for none
                self.turns.note(job, len(job.prompt) + piece.tokens - 1)
            self.meter.counts["completion_tokens"] += 1
            job.give(piece)
            if piece.finish:
                break

    def _view_for(self, job: Job) -> View:
        """Of the next token."""
        with self.turns.lock:
            view = (job.size or self.size).view
            self.turns.come(job, view.allocation.kept)
        return view

    def _note_view(self, job: Job, piece: Piece) -> float:
        """Keeps what runs from now on, and returns its ratio."""
        ratio = self.ratio_of(piece.view)
        if job.view is not None and not np.array_equal(job.view.allocation.kept, piece.view.allocation.kept):  # not a fit alone
            cache = "rebuilt" if piece.carried == "rebuild" else piece.carried
            job.switches.append({"token": piece.tokens, "from": self.ratio_of(job.view), "ratio": ratio, "cache": cache})
        job.view = piece.view
        return ratio

    def _size(self, decider: Decider, ratio: float) -> Size:
        decision = decider.decide(Target(ratio=ratio, nested=self.nested))
        return Size(decision, self.elastic.view(decision.allocation))

    def _sizes(self, decider: Decider) -> list[Size]:
        """From the whole model to the smallest that the agent was trained on."""
        asked = np.linspace(0.0, min(float(decider.agent.max_ratio), largest_ratio(decider.layout)), _TIMED)
        return [self._size(decider, float(ratio)) for ratio in asked]

    def _costs(self, sizes: list[Size], latency_at: Callable[[float], float]) -> Costs:
        """What sizes cost, at the times that a ratio takes."""
        kept = [size.view.allocation.kept for size in sizes]
        weights, kv = (np.array([count(one) for one in kept], dtype=float) for count in (self._weights, self._kv_bytes))
        ratios = [self.ratio_of(size.view) for size in sizes]
        return Costs(np.array(ratios), np.array([latency_at(ratio) for ratio in ratios]), weights, kv)

    def _room_within(self, memory: int | None, ratio: float, decider: Decider) -> Room:
        """As ``keep_within`` has it, of the same requests."""
        top = None if memory is None else self._size(decider, ratio).kept
        room = replace(self.room, goal=memory, top=top)
        if memory is not None and memory < (least := room.least(_LEAST_TOKENS)):
            takes = f"{least:,} bytes of weights and KV cache at ratio {ratio:g}, the largest allowed"
            raise InputError(f"--target-memory must hold {takes}; {memory:,} came; raise it")
        return room

    def _weights(self, kept: np.ndarray) -> int:
        return int(self.decider.layout.kept_params(kept)) * self.bytes_per_param

    def _kv_bytes(self, kept: np.ndarray) -> int:
        """Of one token, in the cache of the elastic model: attention that is gone still caches the unit that runs."""
        sites = zip(self.decider.layout.sites, kept, strict=True)
        return sum(site.cache * running_units(int(count)) for site, count in sites) * self.bytes_per_param

    @property
    def bytes_per_param(self) -> int:
        """Of the weights as they run, and of the KV cache."""
        return int(self.elastic.dtype.itemsize)


def _as_ours(error: Exception) -> Exception:
    if is_memory(error):
        return Refusal(503, NO_ROOM, "no_memory")
    return error
