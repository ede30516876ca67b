"""Turns: threads that run requests wait here, before their first token or between two, until there is room for them."""

import threading
from collections.abc import Callable

import numpy as np

from ppf.server.job import Job
from ppf.server.room import Room
from ppf.server.wire import Refusal

NO_ROOM = "there must be enough memory for a request; there was not; ask for fewer tokens"
_RECHECK = 0.1
"""Seconds; who waits for room is woken when there may be some, but not when its client leaves."""


class Turns:
    """Who may run.

    Args:
        room: What there is.
        live: Int[S] units kept where a request fixes none.

    Attributes:
        lock: Of the room and of what runs.
        on_need: Called, with the lock held, when requests need more room than before or wait for it.
    """

    def __init__(self, room: Room, live: Callable[[], np.ndarray]) -> None:
        self._room, self._live = room, live
        self.lock = threading.Condition(threading.RLock())
        self.on_need: Callable[[], None] = lambda: None

    def enter(self, job: Job) -> bool:
        """Waits for room; whether it came before the client left.

        Raises:
            Refusal: It would never come: another fit has been adopted since the request was checked.
        """
        claim, room = job.claim, self._room
        with self.lock:
            room.waiting.append(claim)
            try:
                while not job.cancelled.is_set():
                    if (most := room.most_tokens(claim.own)) is not None and claim.most > most:
                        raise Refusal(503, NO_ROOM, "no_memory")
                    if room.waiting[0] is claim:
                        self.on_need()
                    if room.may_start(claim, self._live()):
                        room.start(claim, self._live())
                        return True
                    self.lock.wait(_RECHECK)
                return False
            finally:
                room.waiting.remove(claim)
                self.lock.notify_all()

    def leave(self, job: Job) -> None:
        """Gives its room to others."""
        with self.lock:
            if job.claim in self._room.running:
                self._room.running.remove(job.claim)
                self.lock.notify_all()

    def come(self, job: Job, kept: np.ndarray) -> None:
        """Notes at which units the next token is made, before it is: a long step takes them all the while."""
        with self.lock:
            if job.claim.kept is not kept:
                job.claim.kept = kept
                self.lock.notify_all()

    def note(self, job: Job, cached: int) -> None:
        """Notes how many tokens are in the cache; where they need more room, others may have to make it first."""
        with self.lock:
            if job.claim.note(cached):
                job.claim.paused = True
                self.on_need()
                self.lock.notify_all()

    def may_go_on(self, job: Job) -> bool:
        """Whether the next token may be made; waits a moment if others must make room for it first."""
        claim = job.claim
        if not claim.paused:
            return True
        with self.lock:
            claim.paused = not self._room.may_go_on(claim, self._live())
            if claim.paused and self._room.must_come(claim, self._live()):
                return True
            if claim.paused:
                self.lock.wait(_RECHECK)
        return not claim.paused
