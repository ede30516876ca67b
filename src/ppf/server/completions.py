"""/v1/completions and /v1/chat/completions as OpenAI clients speak them, whole or as a stream of events.

An extra field ``prune_ratio`` sets the size of the model for one request; without it the request follows the live ratio. The
answer's extra field ``ppf`` says at which ratio it was made, where that changed on the way, and what ended it. An answer that
the server's time limit or its end cut has the ``finish_reason`` "length", the one of OpenAI's words for what is not whole;
``ppf.ended`` says "time" or "shutdown".
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from ppf.llm.generate import Piece, Sampling
from ppf.server.job import Job, Size
from ppf.server.live import Live
from ppf.server.schemas import ChatBody, CompletionBody
from ppf.server.wire import JsonResponse, Refusal, dump, error_body

_LOG = logging.getLogger(__name__)
_DEFAULT_TOKENS = 16
"""As OpenAI's completions; a chat answers with as many as are allowed."""


@dataclass(frozen=True, eq=False)
class Exchange:
    """One request and how its answer is worded.

    Attributes:
        live: Answers it.
        job: What to run.
        model: Its name.
        chat: Which of the two kinds.
        usage: Whether a stream ends with the number of tokens.
        number: Of the answer.
        created: Seconds since the epoch.
    """

    live: Live
    job: Job
    model: str
    chat: bool
    usage: bool
    number: str
    created: int

    @classmethod
    def of(cls, live: Live, body: CompletionBody | ChatBody, model: str, max_tokens: int) -> "Exchange":
        """Checks a request.

        Raises:
            Refusal: Another model, or more tokens than the model or the server takes.
            InputError: A ratio beyond what the floors allow.
        """
        if body.model not in (None, model):  # there is but one, so that none need be named
            raise Refusal(404, f"the model must be {model}; {body.model!r} came; see /v1/models", "model_not_found")
        chat = isinstance(body, ChatBody)
        prompt = _prompt(live, body)
        default = None if isinstance(body, ChatBody) else min(_DEFAULT_TOKENS, max_tokens)
        asked = body.max_completion_tokens or body.max_tokens or default
        room = live.context - len(prompt)
        if not prompt or room < (asked or 1):
            raise Refusal(
                400,
                f"prompt and answer must be 1 to {live.context} tokens; {len(prompt)} + {asked or 1} came; "
                "change the prompt or max_tokens",
                "context_length_exceeded",
            )
        if (asked or 1) > max_tokens:
            raise Refusal(400, f"max_tokens must be at most {max_tokens}; {asked} came; ask for less", "invalid_value")
        size = None if body.prune_ratio is None else live.size_for(body.prune_ratio)
        room = min(room, _room_beside(live, len(prompt), asked or 1, size))
        temperature, top_p = (1.0 if value is None else float(value) for value in (body.temperature, body.top_p))
        sampling = Sampling(asked or min(max_tokens, room), temperature, top_p, body.seed, body.stops)
        usage = bool(body.stream_options and body.stream_options.include_usage)
        number = ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex
        return cls(live, Job(prompt, sampling, size), model, chat, usage, number, int(time.time()))

    async def whole(self, request: Request) -> Response:
        """One answer, unless the client leaves before it is there.

        Raises:
            Refusal: Too many wait, or there is not enough memory.
        """
        self.live.admit(self.job)
        answer, gone = asyncio.ensure_future(self._whole()), asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
            return answer.result() if answer.done() else Response(status_code=499)
        finally:
            answer.cancel()
            gone.cancel()
            self.live.leave(self.job)

    async def _whole(self) -> Response:
        text, last = [], None
        async for piece in self.live.pieces(self.job):
            text.append(piece.text)
            last = piece
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": _finish(last)}
        words = "".join(text)
        choice |= {"message": {"role": "assistant", "content": words, "refusal": None}} if self.chat else {"text": words}
        return JsonResponse({**self._head(""), "choices": [choice], "usage": self._usage(last), "ppf": self._ppf(last)})

    def stream(self) -> Response:
        """Events, one a token that brought text.

        Raises:
            Refusal: Too many wait.
        """
        self.live.admit(self.job)
        return _Stream(self)

    async def events(self) -> AsyncIterator[bytes]:
        """The lines of a stream, up to its end or to the error that ended it."""
        last = None
        try:
            if self.chat:
                yield self._event({"role": "assistant", "content": ""})
            async for piece in self.live.pieces(self.job):
                last = piece
                if piece.text:
                    yield self._event(piece.text)
        except Exception as error:  # the status has been sent already
            refusal = (
                error
                if isinstance(error, Refusal)
                else Refusal(500, "the server must be able to answer; it failed; see its log", "failed")
            )
            if refusal is not error:
                _LOG.error("a stream failed", exc_info=error)
            yield _line(error_body(refusal.status, refusal.message, refusal.code))
            return
        yield self._event({} if self.chat else "", last, True)
        if self.usage:
            yield _line({**self._head(".chunk"), "choices": [], "usage": self._usage(last), "ppf": self._ppf(last)})
        yield b"data: [DONE]\n\n"

    def _event(self, what: Any, last: Piece | None = None, is_end: bool = False) -> bytes:
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": _finish(last) if is_end else None}
        if self.chat:
            choice["delta"] = {"content": what} if isinstance(what, str) else what
        else:
            choice["text"] = what
        extra = {"ppf": self._ppf(last)} if is_end else {}
        return _line({**self._head(".chunk"), "choices": [choice], **extra})

    def _head(self, part: str) -> dict[str, Any]:
        kind = f"chat.completion{part}" if self.chat else "text_completion"
        return {"id": self.number, "object": kind, "created": self.created, "model": self.model}

    def _usage(self, last: Piece | None) -> dict[str, int]:
        prompt, new = len(self.job.prompt), last.tokens if last else 0
        return {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}

    def _ppf(self, last: Piece | None) -> dict[str, Any]:
        view, ended = self.job.view or self.live.size.view, (last.finish if last else None) or self.job.ended
        return {"ratio": self.live.ratio_of(view), "switches": self.job.switches, "ended": ended}


class _Stream(StreamingResponse):
    """The events of an exchange, whose job leaves when nobody reads them any more, be it before the first."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange.events(), media_type="text/event-stream")
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._exchange.live.leave(self._exchange.job)


def _room_beside(live: Live, prompt: int, asked: int, size: Size | None) -> int:
    """Tokens that an answer may have by the goal of memory.

    Raises:
        Refusal: Fewer than are asked for, so that the request could never run.
    """
    most = live.room.most_tokens(None if size is None else size.kept)
    if most is None:
        return live.context
    if prompt + asked > most:
        at = "any ratio allowed" if size is None else f"prune_ratio {size.decision.asked:g}"
        must = (
            f"prompt and answer must be at most {most} tokens at {at}, by the server's --target-memory; {prompt} + {asked} came; "
        )
        must += f"ask for fewer{'' if size is None else ' or for a larger prune_ratio'}"
        if not most:
            must = f"the model at {at} must leave room for tokens within the server's --target-memory; it leaves none; "
            must += "ask for a larger prune_ratio"
        raise Refusal(400, must, "no_memory")
    return most - prompt


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _finish(last: Piece | None) -> str:
    return (last.finish if last else None) or "length"


def _line(record: dict[str, Any]) -> bytes:
    return b"data: " + dump(record) + b"\n\n"


def _prompt(live: Live, body: CompletionBody | ChatBody) -> list[int]:
    """Token ids.

    Raises:
        Refusal: Ids that the model does not have, or messages that its template does not take.
    """
    tokenizer = live.tokenizer
    if isinstance(body, ChatBody):
        messages = [message.to_template() for message in body.messages]
        if not tokenizer.chat_template:
            return _encoded(live, "\n".join(message["content"] for message in messages) + "\n")
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template raises what it will
            reason = " ".join(str(error).split())[:100]
            raise Refusal(
                400, f"messages must fit the model's chat template; {reason}; change their order", "bad_messages"
            ) from None
        return [int(token) for token in tokenizer.encode(str(text), add_special_tokens=False)]
    prompt = body.prompt[0] if isinstance(body.prompt, list) and isinstance(body.prompt[0], str) else body.prompt
    if isinstance(prompt, str):
        return _encoded(live, prompt)
    most = int(live.elastic.config.vocab_size) - 1
    ids = [int(token) for token in prompt]
    if max(ids) > most:
        raise Refusal(
            400, f"token ids must lie between 0 and {most}; {max(ids)} came; use the model's own tokenizer", "invalid_value"
        )
    return ids


def _encoded(live: Live, text: str) -> list[int]:
    return [int(token) for token in live.tokenizer.encode(text)]
