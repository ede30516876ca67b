"""The routes. Each is a few lines around ``answers``, ``completions`` and the live model."""

import importlib.util
import mimetypes
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ppf.config import Target
from ppf.decide import Decider
from ppf.errors import InputError, PPFError
from ppf.server.answers import policy_record, study_record
from ppf.server.guard import Access, Guard
from ppf.server.wire import JsonResponse, Refusal, as_refusal, refused

_STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True, eq=False)
class Service:
    """What is served.

    Attributes:
        decider: Of the study.
        nested: Whether policies are nested unless a request says otherwise.
    """

    decider: Decider
    nested: bool = False


class PolicyQuery(BaseModel):
    """The query of /api/policy: how small, in one of four wordings."""

    model_config = ConfigDict(extra="forbid")

    ratio: Annotated[float | None, Field(allow_inf_nan=False)] = None
    params: Annotated[str | None, Field(max_length=40)] = None
    memory: Annotated[str | None, Field(max_length=40)] = None
    latency_ms: Annotated[float | None, Field(allow_inf_nan=False, gt=0)] = None
    align: Annotated[int, Field(ge=1, le=65536)] = 1
    tp: Annotated[int, Field(ge=1, le=4096)] = 1
    nested: bool | None = None


def create_app(service: Service, access: Access) -> Guard:
    """The whole application behind its guard."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    _add_errors(app)
    _add_decisions(app, service)
    _add_page(app)
    return Guard(app, access)


def _add_decisions(app: FastAPI, service: Service) -> None:
    study = study_record(service.decider, False)

    @app.get("/api/study")
    async def study_route() -> Response:
        return JsonResponse(study)

    @app.get("/api/policy")
    async def policy_route(query: Annotated[PolicyQuery, Query()]) -> Response:
        return JsonResponse(_policy(service, query))

    @app.get("/api/state")
    async def state_route() -> Response:
        return JsonResponse({"live": False})


def _policy(service: Service, query: PolicyQuery) -> dict[str, Any]:
    given = query.model_dump(exclude={"align", "tp", "nested"}, exclude_none=True)
    if len(given) != 1:
        came = " and ".join(given) or "none"
        raise InputError(f"exactly one of ratio, params, memory and latency_ms must be given; {came} came; give one")
    if query.latency_ms is not None:
        raise Refusal(
            400, "latency_ms must come to a live model; this server has none; ask for ratio, params or memory", "no_model"
        )
    nested = service.nested if query.nested is None else query.nested
    return policy_record(service.decider, Target(**given, align=query.align, tp=query.tp, nested=nested))[1]


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
        field = ".".join(str(part) for part in first["loc"][1:])[:80] or "the body"
        return refused(400, f"{field} must be valid; {first['msg']}; see the documentation of this route", "invalid_value")

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
    if (spec := importlib.util.find_spec("plotly")) and spec.origin:
        bundle = Path(spec.origin).parent / "package_data" / "plotly.min.js"
        files |= {bundle.name: bundle} if bundle.is_file() else {}
    answers = {name: Response(path.read_bytes(), media_type=mimetypes.guess_type(name)[0]) for name, path in files.items()}

    @app.get("/")
    async def page_route() -> Response:
        return answers["index.html"]

    @app.get("/static/{name}")
    async def static_route(name: str) -> Response:
        if name not in answers:
            raise HTTPException(404, "there is no such file")
        return answers[name]
