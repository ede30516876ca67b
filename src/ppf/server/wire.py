"""Strict JSON in and out, and errors in the form that OpenAI clients read."""

import json
import math
from typing import Any

from starlette.responses import Response

from ppf.errors import InputError, PPFError, UnsupportedError

_DEPTH = 64
_DIGITS = 40
"""Of a whole number; those of 64 bits have 20."""
_STATUS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}


class JsonResponse(Response):
    """Strict JSON: a number that is not finite is null."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump(content)


class Refusal(Exception):
    """An answer of a kind other than 200.

    Args:
        status: HTTP status.
        message: What must hold; what came; what to do.
        code: A word for programs.
    """

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def dump(content: Any) -> bytes:
    """Strict JSON in UTF-8."""
    try:
        text = json.dumps(content, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(content), allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def load(body: bytes) -> Any:
    """Reads strict JSON.

    Raises:
        Refusal: Not UTF-8, not JSON, a number that is not finite, a name twice in one record, or too deep.
    """
    try:
        value = json.loads(
            body.decode("utf-8"), parse_constant=_refused, parse_float=_float, parse_int=_int, object_pairs_hook=_unique
        )
        _check_depth(value)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate is no text
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise Refusal(400, f"a body must be strict JSON in UTF-8; {reason}; mend it", "invalid_json") from None
    return value


def error_body(status: int, message: str, code: str) -> dict[str, Any]:
    """``{"error": ...}`` as OpenAI has it."""
    line = "".join(char if char.isprintable() else " " for char in message)
    return {
        "error": {"message": line, "type": _STATUS.get(status, "server_error" if status >= 500 else _STATUS[400]), "code": code}
    }


def refused(status: int, message: str, code: str, headers: dict[str, str] | None = None) -> JsonResponse:
    """An error as an answer; one that will pass says when to ask again."""
    later = {"Retry-After": "1"} if status == 503 else {}
    return JsonResponse(error_body(status, message, code), status, later | (headers or {}))


def as_refusal(error: PPFError) -> Refusal:
    """What an error of the library is to a client; where a message names a flag, the field has the flag's name."""
    if isinstance(error, InputError | UnsupportedError):
        return Refusal(400, str(error).replace("--", ""), "invalid_value")
    return Refusal(503, "the server must be able to answer; it is not; see its log", "unavailable")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


def _float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:20]} is out of range")
    return number


def _int(text: str) -> int:
    if len(text) > _DIGITS:
        raise ValueError(f"a number has more than {_DIGITS} digits")
    return int(text)


def _refused(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a name comes twice in one record")
    return record


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH):
        level = [item for one in level if isinstance(one, dict | list) for item in (one.values() if isinstance(one, dict) else one)]
        if not level:
            return
    raise ValueError("it is nested too deeply")
