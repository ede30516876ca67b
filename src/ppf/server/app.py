"""The routes that need no language model, and what they all share. The live model adds its own (served.py)."""

import asyncio
import contextlib
import mimetypes
from collections import Counter
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response

from ppf.config import Target
from ppf.decide import Decider
from ppf.errors import InputError, PPFError
from ppf.server.answers import policy_record, study_record
from ppf.server.controller import Costs
from ppf.server.fields import of_field
from ppf.server.guard import Access, Guard
from ppf.server.metrics import prometheus
from ppf.server.refit import fit_id, follow
from ppf.server.schemas import PolicyQuery, RatioBody
from ppf.server.wire import JsonResponse, Refusal, as_refusal, refused
from ppf.study import Mark

_STATIC = Path(__file__).parent / "static"


class LivePart(Protocol):
    """What the application needs of a live model; it knows no more of it, so that decisions alone need no torch."""

    @property
    def costs(self) -> Costs:
        """What ratios cost on an idle machine."""
        ...

    @property
    def bytes_per_param(self) -> int:
        """Of the weights as they run."""
        ...

    @property
    def max_body(self) -> int:
        """Bytes that a prompt as long as the model's context may take."""
        ...

    def add_routes(self, app: FastAPI) -> None:
        """Adds what only a live model answers."""
        ...

    def state(self) -> dict[str, Any]:
        """A JSON-ready record of what runs."""
        ...

    def set_ratio(self, ratio: float) -> None:
        """Changes what runs where a request names no ratio."""
        ...

    def adopt(self, decider: Decider) -> None:
        """Decides by another fit of the same model from now on."""
        ...

    async def watch(self) -> None:
        """Lets the controller look, until cancelled."""
        ...

    def close(self) -> None:
        """Ends what runs."""
        ...


@dataclass(eq=False)
class Service:
    """What is served.

    Attributes:
        decider: Of the study; replaced as a whole when the study has been fitted anew.
        live: The live model; None serves decisions alone.
        nested: Whether policies are nested unless a request says otherwise.
        mark: Of the fit; None serves this one for ever.
        fits: How many were served so far.
        study: What the server knows of the study, and the fit that it is of.
    """

    decider: Decider
    live: LivePart | None = None
    nested: bool = False
    mark: Mark | None = None
    fits: int = field(default=1, init=False)
    study: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.study = {**study_record(self.decider, self.live is not None), "fit": fit_id(self.mark)}

    def adopt(self, decider: Decider, study: dict[str, Any]) -> None:
        """Answers by another fit from now on.

        Raises:
            InputError: The model that runs does not fit it.
        """
        if self.live is not None:
            self.live.adopt(decider)
        self.decider, self.study, self.fits = decider, study, self.fits + 1

    def tasks(self) -> list[Coroutine[Any, Any, None]]:
        """What runs beside the requests."""
        following = [] if self.mark is None else [follow(self.decider.study.folder, self.mark, self.live is not None, self.adopt)]
        return following if self.live is None else [*following, self.live.watch()]


def create_app(service: Service, access: Access) -> Guard:
    """The whole application behind its guard."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(task) for task in service.tasks()]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            if service.live is not None:
                service.live.close()

    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    most = access.max_body if service.live is None else max(access.max_body, service.live.max_body)
    guard = Guard(app, replace(access, max_body=most))
    _add_errors(app)
    _add_decisions(app, service)
    _add_state(app, service, guard.counts)
    if service.live is None:
        _add_absent(app)
    else:
        service.live.add_routes(app)
    _add_page(app)
    return guard


def _add_decisions(app: FastAPI, service: Service) -> None:
    @app.get("/api/study")
    async def study_route() -> Response:
        return JsonResponse(service.study)

    @app.get("/api/policy")
    async def policy_route(request: Request) -> Response:
        return JsonResponse(_policy(service, _query(request)))


def _query(request: Request) -> PolicyQuery:
    """The query; FastAPI would silently take the last of two fields of one name."""
    pairs = request.query_params.multi_items()
    if len(pairs) != len(dict(pairs)):
        raise InputError("a query must name each field once; one came twice; leave one out")
    try:
        return PolicyQuery.model_validate(dict(pairs))
    except ValidationError as error:
        raise of_field(error.errors()[0], dict(pairs)) from error


def _policy(service: Service, query: PolicyQuery) -> dict[str, Any]:
    given = query.model_dump(exclude={"align", "tp", "nested"}, exclude_none=True)
    if len(given) != 1:
        came = " and ".join(given) or "none"
        raise InputError(f"exactly one of ratio, params, memory and latency_ms must be given; {came} came; give one")
    if query.latency_ms is not None:
        given = {"ratio": _ratio_for(service, query.latency_ms)}
    nested = service.nested if query.nested is None else query.nested
    target = Target(**given, align=query.align, tp=query.tp, nested=nested)
    record = {**policy_record(service.decider, target), "fit": service.study["fit"]}
    if service.live is None:
        return record
    latency = service.live.costs.latency_at(record["ratio"]["met"])
    in_use = record["params"]["after"] * service.live.bytes_per_param
    return {**record, "memory_in_use": in_use, "latency_ms": latency, "tokens_per_second": 1e3 / latency}


def _ratio_for(service: Service, latency_ms: float) -> float:
    if service.live is None:
        raise Refusal(400, "latency_ms needs a live model; this server has none; ask for ratio, params or memory", "no_model")
    ratio = service.live.costs.ratio_for(latency_ms)
    if ratio is None:
        least = service.live.costs.latency_ms[-1]
        raise InputError(f"a token takes at least {least:.3g} ms here; latency_ms {latency_ms:g} came; ask for more")
    return ratio


def _add_state(app: FastAPI, service: Service, counts: Counter[int]) -> None:
    live = service.live

    def state() -> dict[str, Any]:
        served = {"live": live is not None, "fit": service.study["fit"], "fits": service.fits}
        return served if live is None else {**served, **live.state()}

    @app.get("/api/state")
    async def state_route() -> Response:
        return JsonResponse(state())

    @app.get("/metrics")
    async def metrics_route() -> Response:
        return PlainTextResponse(prometheus(state(), counts), media_type="text/plain; version=0.0.4")

    @app.post("/api/ratio")
    async def ratio_route(body: RatioBody) -> Response:
        if live is None:
            raise _absent()
        live.set_ratio(body.ratio)
        return JsonResponse(_policy(service, PolicyQuery(ratio=body.ratio)))


def _absent() -> Refusal:
    return Refusal(404, "a live model must be served for this; this server has none; start it without --no-model", "no_model")


def _add_absent(app: FastAPI) -> None:
    @app.get("/v1/models")
    async def models_route() -> Response:
        return JsonResponse({"object": "list", "data": []})

    @app.api_route("/v1/{kind:path}", methods=["GET", "POST"])
    async def absent_route(kind: str) -> Response:
        raise _absent()


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(PPFError)
    async def of_library(_: Request, error: PPFError) -> Response:
        refusal = as_refusal(error)
        return refused(refusal.status, refusal.message, refusal.code)

    @app.exception_handler(Refusal)
    async def of_route(_: Request, error: Refusal) -> Response:
        return refused(error.status, error.message, error.code)

    @app.exception_handler(RequestValidationError)
    async def of_fields(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        refusal = of_field({**first, "loc": first["loc"][1:]}, error.body)  # its place begins with "body"
        return refused(refusal.status, refusal.message, refusal.code)

    @app.exception_handler(HTTPException)
    async def of_path(_: Request, error: HTTPException) -> Response:
        message = f"a path and its method must be ones that the server has; {error.detail}; see its documentation"
        return refused(error.status_code, message, "unknown_route", dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def of_ours(_: Request, error: Exception) -> Response:
        return refused(500, "the server must be able to answer; it failed; see its log", "failed")


def _add_page(app: FastAPI) -> None:
    """The page's files are read once and looked up by name, so that no path is ever opened for a request."""
    files = {path.name: path for path in _STATIC.iterdir() if path.is_file()}
    answers = {name: Response(path.read_bytes(), media_type=mimetypes.guess_type(name)[0]) for name, path in files.items()}

    @app.get("/")
    async def page_route() -> Response:
        return answers["index.html"]

    @app.get("/static/{name}")
    async def static_route(name: str) -> Response:
        if name not in answers:
            raise HTTPException(404, "there is no such file")
        return answers[name]
