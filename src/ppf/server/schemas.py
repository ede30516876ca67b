"""What clients may send. Fields are OpenAI's; what would change an answer and is not there is refused, never ignored."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Ratio = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)]
Token = Annotated[int, Field(ge=0)]
Stop = Annotated[str, Field(min_length=1, max_length=200)]


class _Strict(BaseModel):
    """No number from a string, no field that is not known."""

    model_config = ConfigDict(strict=True, extra="forbid")


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


class RatioBody(_Strict):
    """The body of POST /api/ratio."""

    ratio: Ratio


class StreamOptions(_Strict):
    """What a stream brings beside text."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Request(_Strict):
    """What both kinds of completion share."""

    model: Annotated[str, Field(max_length=300)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float | None, Field(ge=0, le=2, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, allow_inf_nan=False)] = None
    n: Literal[1] | None = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prune_ratio: Ratio | None = None
    user: Annotated[str | None, Field(max_length=300)] = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, Field(max_length=0)] = None

    @field_validator("frequency_penalty", "presence_penalty")
    @classmethod
    def _none_at_all(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("penalties are not there; leave it out or send 0")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(_Request):
    """The body of POST /v1/completions."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] | Annotated[list[Token], Field(min_length=1)]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: None = None
    suffix: None = None


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None

    def to_template(self) -> dict[str, Any]:
        """As a chat template takes it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(_Request):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=1000)]
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    logprobs: Literal[False] | None = None
    top_logprobs: None = None
    response_format: None = None
    tools: None = None
    tool_choice: None = None
