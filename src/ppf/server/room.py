"""Room: what requests take of a memory goal, so that one runs only where all of it will fit. No clock, no thread, no model.

Two figures of tokens decide. What a request may take at most, its prompt and all that it may still make, must fit beside the
same of all others at the largest ratio allowed, or it waits: so the way out of every shortage is open. What it holds room for
now, a little more than it has, must fit at the ratio that runs: the ratio follows what is used and not the many tokens that
``max_tokens`` allows and few answers need, yet rises before they are made. Who needs more waits, between two tokens, until the
others have come to that ratio: one of their steps may be a long prompt. All of it needs nested sizes, of which no two together
read more than the larger.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ppf.server.controller import Load

_BLOCK = 64
"""Tokens. Room is held for at least so many ahead, so that who waits for more has not used up what it has."""


@dataclass(eq=False)
class Claim:
    """What one request takes.

    Attributes:
        prompt: Its tokens.
        most: Tokens of its prompt and of all that it may make.
        own: Int[S] units kept, if the request fixed them; None follows what runs.
        kept: Int[S] units of its KV cache; None before it runs.
        cached: Tokens in its KV cache.
        booked: Tokens that it holds room for.
        paused: Whether it waits, between two tokens, until others have made room for all that it booked.
    """

    prompt: int
    most: int
    own: np.ndarray | None = None
    kept: np.ndarray | None = None
    cached: int = 0
    booked: int = 0
    paused: bool = False

    def __post_init__(self) -> None:
        self.booked = self._wanted(self.prompt)

    def note(self, cached: int) -> bool:
        """Keeps how many tokens are in the cache, and tells whether it holds more room for that."""
        self.cached, before = cached, self.booked
        self.booked = max(before, self._wanted(cached))
        return self.booked > before

    def _wanted(self, cached: int) -> int:
        return min(self.most, (cached // _BLOCK + 2) * _BLOCK)


@dataclass(eq=False)
class Room:
    """All claims within a goal.

    Attributes:
        weights: Bytes of the weights of kept units.
        kv: Bytes of one token in a KV cache.
        goal: Bytes; None has room for everything.
        top: Int[S] units kept at the largest ratio allowed; None without a goal.
        running: Claims of requests under way.
        waiting: Claims of those that wait for room, in their order.
    """

    weights: Callable[[np.ndarray], int]
    kv: Callable[[np.ndarray], int]
    goal: int | None = None
    top: np.ndarray | None = None
    running: list[Claim] = field(default_factory=list)
    waiting: deque[Claim] = field(default_factory=deque)

    def in_use(self, live: np.ndarray) -> tuple[int, int]:
        """Bytes of the weights that are read, and of the KV caches, where units ``live`` run."""
        claims = [(claim.kept, claim.cached) for claim in list(self.running) if claim.kept is not None]
        return self._bytes([(live, 0), *claims])

    def may_start(self, claim: Claim, live: np.ndarray) -> bool:
        """Whether it is its turn and it fits, while others may still be where they were or be on their way to ``live``."""
        if self.waiting[0] is not claim or not self.can_ever_fit(claim):
            return False
        return self._fits([(live, 0), (_of(claim, live), claim.booked), *((_until(one, live), one.booked) for one in self.running)])

    def may_go_on(self, claim: Claim, live: np.ndarray) -> bool:
        """Whether one that runs may take all that it booked.

        Others that wait hold no more than they have, and the token that ``must_come`` may let them make.
        """
        others = [one for one in self.running if one is not claim]
        held = [(_until(one, live), one.cached + 1 if one.paused else one.booked) for one in others]
        return self._fits([(live, 0), (_of(claim, live), claim.booked), *held])

    def must_come(self, claim: Claim, live: np.ndarray) -> bool:
        """Whether one that waits is to make one token all the same, since all wait for each other and it holds the most.

        At ``live`` it needs less than where it is, and the token is one that it held room for before; all who come in this
        way fit at last.
        """
        follow = [one for one in self.running if one.own is None]
        most = max(follow, key=lambda one: self.weights(_until(one, live)), default=claim)
        return claim is most and all(one.paused for one in self.running)

    def start(self, claim: Claim, live: np.ndarray) -> None:
        """Lets it run."""
        claim.kept, claim.cached = _of(claim, live), claim.prompt
        self.running.append(claim)

    def can_ever_fit(self, claim: Claim) -> bool:
        """Whether all that it and those under way may ever take fits at the largest ratio allowed."""
        return self._can_fit([*self.running, claim])

    def can_finish(self) -> bool:
        """Whether all that those under way may ever take fits at the largest ratio allowed; another fit may allow less."""
        return self._can_fit(self.running)

    def holds(self, live: np.ndarray) -> bool:
        """Whether all who run, and the next who can, fit once all are at ``live``."""
        return self._fits([(live, 0), *((_of(one, live), one.booked) for one in self._counted())])

    def is_settled(self, live: np.ndarray) -> bool:
        """Whether none who run take more than at ``live``; one whose step began before the last rise does."""
        return all((_until(one, live) <= _of(one, live)).all() for one in self.running)

    def most_tokens(self, own: np.ndarray | None = None) -> int | None:
        """Tokens that a request alone may take, at units that it fixes or at the largest ratio; None: any number."""
        if self.goal is None or self.top is None:
            return None
        weights, token = self._bytes([(self.top, 0), (self.top if own is None else own, 1)])
        return max(0, self.goal - weights) // token

    def least(self, tokens: int) -> int:
        """Bytes that a request of so many tokens takes at the largest ratio."""
        return 0 if self.top is None else sum(self._bytes([(self.top, tokens)]))

    def load(self, slowdown: float) -> Load:
        """What the controller looks at."""
        claims = self._counted()
        own = [(claim.own, claim.booked) for claim in claims if claim.own is not None]
        weights, caches = self._bytes(own) if own else (0, 0)
        return Load(slowdown, sum(claim.booked for claim in claims if claim.own is None), weights, caches)

    def _counted(self) -> list[Claim]:
        """Those who run, and the first who waits if it can be let in."""
        return [*self.running, *(claim for claim in list(self.waiting)[:1] if self.can_ever_fit(claim))]

    def _can_fit(self, claims: Iterable[Claim]) -> bool:
        return self.top is None or self._fits([(self.top, 0), *((_of(one, self.top), one.most) for one in claims)])

    def _fits(self, held: Iterable[tuple[np.ndarray, int]]) -> bool:
        return self.goal is None or sum(self._bytes(held)) <= self.goal

    def _bytes(self, held: Iterable[tuple[np.ndarray, int]]) -> tuple[int, int]:
        """Of the weights that any of the units need, and of so many tokens in caches of each."""
        pairs = list(held)
        kept = np.maximum.reduce([kept for kept, _ in pairs])
        return self.weights(kept), int(sum(self.kv(kept) * tokens for kept, tokens in pairs if tokens))


def _until(claim: Claim, live: np.ndarray) -> np.ndarray:
    """What it may need until it has come to ``live``."""
    return np.maximum(_of(claim, live), live if claim.kept is None else claim.kept)


def _of(claim: Claim, live: np.ndarray) -> np.ndarray:
    return live if claim.own is None else claim.own
