"""What clients may send. Fields are OpenAI's; what would change an answer and is not there is refused, never ignored.

Every field says in words what it must be; a refusal says so too (fields.py).
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator


def _is_off(value: Any) -> Any:
    if value:
        raise ValueError("it is not there")
    return value


# Literal[1] and Literal[False] would take what is equal to them: true, and 0
One = Annotated[int, Field(ge=1, le=1)]
No = Annotated[bool, AfterValidator(_is_off)]
Zero = Annotated[float, AfterValidator(_is_off)]
Ratio = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]
Words = Annotated[str, Field(max_length=300)]
_ABSENT = "left out: this server has none"


def _is(words: str, default: Any = None, **limits: Any) -> Any:
    """A field, and what it must be."""
    return Field(default, description=words, **limits)


class _Strict(BaseModel):
    """No number from a string, no field that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid")


class PolicyQuery(BaseModel):
    """The query of /api/policy: how small, in one of four wordings."""

    model_config = ConfigDict(extra="forbid")

    ratio: float | None = _is("a number from 0 to less than 1", allow_inf_nan=False)
    params: str | None = _is("a number of parameters such as 3M", max_length=40)
    memory: str | None = _is("a size such as 6MB", max_length=40)
    latency_ms: float | None = _is("a number of milliseconds above 0", allow_inf_nan=False, gt=0)
    align: int = _is("a whole number from 1 to 65536", 1, ge=1, le=65536)
    tp: int = _is("a whole number from 1 to 4096", 1, ge=1, le=4096)
    nested: bool | None = _is("true or false")

    @field_validator("ratio", "latency_ms", "align", "tp", mode="before")
    @classmethod
    def _as_json_has_it(cls, value: Any) -> Any:
        if isinstance(value, str) and "_" in value:  # a number in Python alone
            raise ValueError("a number has no underscores")
        return value


class RatioBody(_Strict):
    """The body of POST /api/ratio."""

    ratio: Ratio = _is("a number from 0 to less than 1", ...)


class StreamOptions(_Strict):
    """What a stream brings beside text."""

    include_usage: bool | None = _is("true or false")
    include_obfuscation: bool | None = _is("true or false")


class _Request(_Strict):
    """What both kinds of completion share."""

    model: Words | None = _is("the name of the model at /v1/models, or left out")
    max_tokens: int | None = _is("a whole number above 0", ge=1)
    max_completion_tokens: int | None = _is("a whole number above 0", ge=1)
    temperature: float | None = _is("a number from 0 to 2", ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = _is("a number above 0, at most 1", gt=0, le=1, allow_inf_nan=False)
    n: One | None = _is("1 or left out: there is one answer to a request")
    seed: int | None = _is("a whole number of 64 bits", ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = _is("a text of 1 to 200 characters, or at most 4 of them")
    stream: bool | None = _is("true or false")
    stream_options: StreamOptions | None = _is('an object such as {"include_usage": true}')
    prune_ratio: Ratio | None = _is("a number from 0 to less than 1")
    user: Words | None = _is("a text of at most 300 characters")
    frequency_penalty: Zero | None = _is("0 or left out: this server has no penalties")
    presence_penalty: Zero | None = _is("0 or left out: this server has no penalties")
    logit_bias: dict[str, float] | None = _is("empty or left out: this server has none", max_length=0)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(_Request):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] | Annotated[list[Token], Field(min_length=1)] = _is(
        "one text, or a list of one text or of token ids", ...
    )
    best_of: One | None = _is("1 or left out: there is one answer to a request")
    echo: No | None = _is("false or left out: an answer does not repeat its prompt")
    logprobs: None = _is(_ABSENT)
    suffix: None = _is(_ABSENT)


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"] = _is('"text", the one kind of part that the model reads', ...)
    text: str = _is("a text", ...)


class ChatMessage(_Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"] = _is("system, developer, user or assistant", ...)
    content: str | Annotated[list[TextPart], Field(min_length=1)] = _is(
        'a text, or a list of parts such as {"type": "text", "text": "..."}', ...
    )
    name: str | None = _is("a text")

    def to_template(self) -> dict[str, Any]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(_Request):
    """The body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = _is(
        'a list of 1 to 1000 messages such as {"role": "user", "content": "..."}', ..., min_length=1, max_length=1000
    )
    logprobs: No | None = _is(_ABSENT)
    top_logprobs: None = _is(_ABSENT)
    response_format: None = _is(_ABSENT)
    tools: None = _is(_ABSENT)
    tool_choice: None = _is(_ABSENT)
