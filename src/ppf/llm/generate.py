"""Generation, token by token, on an elastic model whose size may change between two tokens.

ids ─► view wanted now ─► does the KV cache fit it? kept | narrowed | rebuilt ─► one forward pass ─► sample ─► text
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from ppf.llm.elastic import Carried, ElasticModel
from ppf.llm.prefix import View

_COLD = 1e-5
"""Below this temperature the likeliest token is all that is left."""
_CONTEXT = 8
"""Tokens before the first new one that decoding looks at, so that spaces and parts of characters come out right."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when generation ends.

    Attributes:
        max_tokens: The most new tokens.
        temperature: 0, or next to it, takes the likeliest token.
        top_p: Only the likeliest tokens that together have this probability.
        seed: Of the choice; None draws one.
        stop: Strings before which the text ends.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """What one token brought.

    Attributes:
        text: New text, often empty: half a character, or what may be the beginning of a stop string.
        tokens: New tokens so far.
        seconds: Time of its forward pass.
        view: What ran.
        carried: What became of the KV cache before this token; None for the first.
        finish: ``"stop"`` or ``"length"`` at the last piece, else None.
    """

    text: str
    tokens: int
    seconds: float
    view: View
    carried: Carried | None
    finish: str | None = None


def generate(
    elastic: ElasticModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[int],
    sampling: Sampling,
    wanted: Callable[[], View],
) -> Iterator[Piece]:
    """Continues a prompt.

    Args:
        elastic: The model.
        tokenizer: Its own.
        prompt: At least one token id.
        sampling: How.
        wanted: The view for the next token; may change at any time.

    Yields:
        One piece a token; the last has a ``finish``.
    """
    tokens, text = list(prompt), _Text(tokenizer, prompt, sampling.stop)
    draw, ends = _Draw(sampling), _ends(elastic, tokenizer)
    view, cache = wanted(), None
    for count in range(1, sampling.max_tokens + 1):
        carried: Carried | None = None
        if cache is not None:
            before, view = view, wanted()
            carried = "kept" if view is before else elastic.carry(cache, before, view)
        start = time.perf_counter()
        if cache is None or carried == "rebuild":
            cache, ids = DynamicCache(config=elastic.config), tokens
        else:
            ids = tokens[-1:]
        token = draw(_last_logits(elastic, view, cache, ids))
        seconds = time.perf_counter() - start
        tokens.append(token)
        new, stopped = ("", True) if token in ends else text.add(token)
        finish = "stop" if stopped else "length" if count == sampling.max_tokens else None
        yield Piece(new + text.rest() if finish else new, count, seconds, view, carried, finish)
        if finish:
            return


@torch.inference_mode()
def _last_logits(elastic: ElasticModel, view: View, cache: DynamicCache, ids: Sequence[int]) -> torch.Tensor:
    """Float[V] after the last of the ids, which the cache takes in."""
    with elastic.at(view) as model:
        inputs = torch.tensor([list(ids)], device=elastic.device)
        return model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1].float().cpu()


def _ends(elastic: ElasticModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    with elastic.at() as model:
        ends = model.generation_config.eos_token_id
    known = [*ends] if isinstance(ends, list | tuple) else [ends]
    return {token for token in (*known, tokenizer.eos_token_id) if token is not None}


class _Draw:
    """Chooses tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling, self._generator = sampling, torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        if self._sampling.temperature < _COLD:
            return int(logits.argmax())
        shares, tokens = torch.softmax((logits - logits.max()) / self._sampling.temperature, 0).sort(descending=True)
        before = shares.cumsum(0) - shares
        kept = torch.where(before < self._sampling.top_p, shares, 0.0)
        kept[0] = shares[0]  # the likeliest stays, however small top_p is
        return int(tokens[torch.multinomial(kept, 1, generator=self._generator)])


class _Text:
    """Turns tokens into text as they come, and holds back what may be the beginning of a stop string."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], stop: tuple[str, ...]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids, self._start, self._held = list(prompt[-_CONTEXT:]), 0, ""
        self._read = len(self._ids)

    def add(self, token: int) -> tuple[str, bool]:
        """The text that is certain now, and whether a stop string ended it."""
        self._ids.append(token)
        fresh = self._fresh()
        if not fresh.endswith("\ufffd"):
            self._start, self._read = self._read, len(self._ids)
            self._held += fresh
        return self._released()

    def rest(self) -> str:
        """What was held back, at the end."""
        text, self._held = self._held + self._fresh(), ""
        self._read = len(self._ids)
        return text

    def _fresh(self) -> str:
        known = self._decoded(self._ids[self._start : self._read])
        return self._decoded(self._ids[self._start :])[len(known) :]

    def _decoded(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _released(self) -> tuple[str, bool]:
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            text, self._held = self._held[: min(found)], ""
            return text, True
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        sizes = range(min(longest, len(self._held)), 0, -1)
        held = next((size for size in sizes if any(stop.startswith(self._held[-size:]) for stop in self._stop)), 0)
        cut = len(self._held) - held
        text, self._held = self._held[:cut], self._held[cut:]
        return text, False
