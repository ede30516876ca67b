"""What is wrong with a field, in one line: what must hold, from its schema; what came; what to do."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ppf.server.schemas import ChatBody, ChatMessage, CompletionBody, PolicyQuery, RatioBody, StreamOptions, TextPart
from ppf.server.wire import Refusal

_MUST = {
    name: field.description
    for schema in (PolicyQuery, RatioBody, CompletionBody, ChatBody, ChatMessage, TextPart, StreamOptions)
    for name, field in schema.model_fields.items()
}
_LONGEST = 60


def of_field(error: Mapping[str, Any], given: Any) -> Refusal:
    """What pydantic says of one field.

    Args:
        error: Its first error, the place of which begins within what was given.
        given: What it looked at.
    """
    place, name = _place(error["loc"], given)
    came = _shown(error["input"])
    if error["type"] == "extra_forbidden":
        message = f"a request may have the fields that this route knows; {_shown(place)} came; leave it out"
    elif not name:
        message = f"the body must be a JSON object; {'none' if error['type'] == 'missing' else came} came; send one"
    elif error["type"] == "missing":
        message = f"{place} must be {_MUST[name]}; it did not come; add it"
    else:
        must = _MUST[name]
        message = f"{place} must be {must}; {came} came; {'leave it out' if 'left out' in must else 'change it'}"
    return Refusal(400, message, "invalid_value")


def _place(loc: Sequence[int | str], given: Any) -> tuple[str, str]:
    """Where an error is, as whoever sent it would write it, and the name of the field; a union's alternatives are no part of it."""
    place, name = "", ""
    for part in loc:
        if isinstance(part, int) and isinstance(given, list):
            place, given = f"{place}[{part}]", given[part]
        elif isinstance(given, dict) and (part in given or part in _MUST):
            place, given = f"{place}.{part}" if place else str(part), given.get(part)
            name = str(part) if part in _MUST else name
    return place, name


def _shown(value: Any) -> str:
    """A value in JSON, cut short."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " ..."
