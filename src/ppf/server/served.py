"""The live model as a part of the server: its routes, its controller, and how it is opened."""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from ppf.config import ServeConfig, Target
from ppf.decide import Decider
from ppf.errors import InputError
from ppf.llm.load import quiet_transformers
from ppf.progress import Progress
from ppf.provenance import own_name
from ppf.recipes.live import elastic_for
from ppf.server.completions import Exchange
from ppf.server.controller import LEAST, Costs, Goal, Load, State, rise, step
from ppf.server.live import Live
from ppf.server.schemas import ChatBody, CompletionBody
from ppf.server.wire import JsonResponse, Refusal
from ppf.space.budget import largest_ratio, parse_size

_LOOK_SECONDS = 0.5
_BYTES_PER_TOKEN = 16
_log = logging.getLogger("ppf.server")


class Served:
    """A live model, under a name, with a controller if there is a goal.

    Args:
        live: The model.
        name: As clients call it.
        max_tokens: The most that one request may ask for.
        goal_of: What the controller aims at with a fit; nothing leaves the ratio alone.
    """

    def __init__(self, live: Live, name: str, max_tokens: int, goal_of: Callable[[Decider], Goal | None] = lambda _: None) -> None:
        self.live, self.name, self.max_tokens, self._goal_of = live, name, max_tokens, goal_of
        self._at = State(live.size.decision.asked)
        self.goal = goal_of(live.decider)
        if self.goal is not None:
            live.keep_within(self.goal.memory, self.goal.high)
        live.turns.on_need = self._look_now
        self._decisions: deque[dict[str, Any]] = deque(maxlen=20)
        self._created = int(time.time())

    @property
    def costs(self) -> Costs:
        """See ``LivePart``."""
        return self.live.costs

    @property
    def bytes_per_param(self) -> int:
        """See ``LivePart``."""
        return self.live.bytes_per_param

    @property
    def max_body(self) -> int:
        """See ``LivePart``."""
        return _BYTES_PER_TOKEN * self.live.context

    def add_routes(self, app: FastAPI) -> None:
        """See ``LivePart``."""

        @app.get("/v1/models")
        async def models_route() -> Response:
            return JsonResponse({"object": "list", "data": [self._model()]})

        @app.get("/v1/models/{name:path}")
        async def model_route(name: str) -> Response:
            if name != self.name:
                raise Refusal(404, f"the model must be {self.name}; another came; see /v1/models", "model_not_found")
            return JsonResponse(self._model())

        @app.post("/v1/completions")
        async def completions_route(body: CompletionBody, request: Request) -> Response:
            return await self._answer(body, request)

        @app.post("/v1/chat/completions")
        async def chat_route(body: ChatBody, request: Request) -> Response:
            return await self._answer(body, request)

    def state(self) -> dict[str, Any]:
        """See ``LivePart``."""
        goal = self.goal
        controller: dict[str, Any] = {"on": goal is not None}
        if goal is not None:
            controller |= {
                "target": {"latency_ms": goal.latency_ms, "memory": goal.memory},
                "limits": {"min_ratio": goal.low, "max_ratio": goal.high},
                "decisions": list(self._decisions),
            }
        return {**self.live.state(), "max_tokens": self.max_tokens, "controller": controller}

    def set_ratio(self, ratio: float) -> None:
        """See ``LivePart``."""
        if self.goal is not None:
            raise Refusal(409, "a ratio is set by hand only without a controller; it is on; start without targets", "controlled")
        self.live.set_ratio(ratio)

    def adopt(self, decider: Decider) -> None:
        """See ``LivePart``. The controller's limits are those of the new fit, and so is the ratio that it stands at."""
        goal = self._goal_of(decider)
        with self.live.turns.lock:  # or a thread that needs room goes on to a size of the old fit
            if goal is None:
                self.live.adopt(decider)
            else:
                to = State(min(max(self._at.ratio, goal.low), goal.high))
                self.live.adopt(decider, to.ratio, goal.memory, goal.high)
                self._stand(to, "the study was fitted anew, with other limits")
            self.goal = goal
            self._try_look()  # the same ratio of another fit may need more memory

    async def watch(self) -> None:
        """See ``LivePart``."""
        while True:
            self._try_look()
            await asyncio.sleep(_LOOK_SECONDS)

    def look(self, goal: Goal) -> None:
        """Lets the controller decide once."""
        with self.live.turns.lock:
            to, reason = step(self._at, self._load(goal), goal, self.costs)
            if to.ratio >= self._at.ratio or self.live.room.is_settled(self.live.size.kept):
                self._go(goal, to, reason)

    def _try_look(self) -> None:
        try:
            self.live.learn()
            if self.goal is not None:
                self.look(self.goal)
        except Exception:  # whatever it is, the next look may go well, and the server goes on
            _log.exception("the controller could not decide")

    def _look_now(self) -> None:
        """Lets the ratio rise before what requests have come to need is there."""
        if self.goal is not None and self.goal.memory is not None:
            self._go(self.goal, *rise(self._at, self._load(self.goal), self.goal, self.costs))

    def _load(self, goal: Goal) -> Load:
        return self.live.load(is_timed=goal.latency_ms is not None)  # thousands of times are no matter for a goal of memory

    def _go(self, goal: Goal, to: State, reason: str) -> None:
        """Goes where the controller says, or as far beyond as it takes: costs between those counted are a guess."""
        size = self.live.size if to.ratio == self._at.ratio else self.live.size_for(to.ratio)
        while to.ratio < goal.high and not self.live.room.holds(size.kept):
            to, reason = State(min(goal.high, to.ratio + LEAST)), reason or "requests need room"
            size = self.live.size_for(to.ratio)
        if to.ratio != self._at.ratio:
            self.live.run_at(size)
        self._stand(to, reason)

    def _stand(self, to: State, reason: str) -> None:
        """Stands where the model is by now; where that is another ratio, it is told why."""
        before, self._at = self._at.ratio, to
        if to.ratio != before:
            self._decisions.append({"time": time.time(), "from": before, "to": to.ratio, "reason": reason})
            _log.warning("ratio %.3f -> %.3f: %s", before, to.ratio, reason)

    def close(self) -> None:
        """See ``LivePart``."""
        self.live.close()

    async def _answer(self, body: CompletionBody | ChatBody, request: Request) -> Response:
        exchange = await run_in_threadpool(Exchange.of, self.live, body, self.name, self.max_tokens)
        return exchange.stream() if body.stream else await exchange.whole(request)

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "ppf"}


def open_served(config: ServeConfig, decider: Decider) -> Served:
    """Loads the model of a study and makes it elastic.

    Raises:
        InputError: A ratio beyond what the floors allow, or a study of an object.
        DamagedError: A study of another model.
        UnsupportedError: A model that cannot be elastic.
    """
    quiet_transformers()
    top = largest_ratio(decider.layout)
    for flag, ratio in (("--max-ratio", config.max_ratio or 0.0), ("--min-ratio", config.min_ratio)):
        if ratio > top:
            raise InputError(f"{flag} must be at most {top:g}, the largest ratio of this model; {ratio:g} came; lower it")
    goal = goal_for(config, decider)
    if goal is not None and max(config.ratio, config.min_ratio) > goal.high:
        trained = f"{goal.high:g}, the largest that was trained"
        raise InputError(f"--ratio and --min-ratio must be at most {trained}; more came; change them, or go on with --max-ratio")
    ratio = config.ratio if goal is None else min(max(config.ratio, goal.low), goal.high)
    decider.decide(Target(ratio=ratio, nested=config.decides_nested))  # refuses before the model is loaded
    progress = Progress()
    elastic, tokenizer = elastic_for(decider, config.model, config.device, config.dtype, progress)
    with progress.stage("timing"):
        live = Live(decider, elastic, tokenizer, ratio, config.decides_nested)
    name = own_name(config.model or decider.study.record["model"]["name"])
    try:
        served = Served(live, name, config.max_tokens, lambda fit: goal_for(config, fit))
    except InputError:
        live.close()
        raise
    if live.nested and not config.nested:
        _log.warning("policies are nested, since --target-memory came: of others two sizes together read more than either")
    return served


def goal_for(config: ServeConfig, decider: Decider) -> Goal | None:
    """What the controller aims at, between limits that lie within what a fit allows; None without a target."""
    if not config.controlled:
        return None
    memory = None if config.target_memory is None else parse_size(config.target_memory)
    high = min(float(decider.agent.max_ratio) if config.max_ratio is None else config.max_ratio, largest_ratio(decider.layout))
    return Goal(config.target_latency_ms, memory, min(config.min_ratio, high), high)
