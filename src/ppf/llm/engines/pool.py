"""Masks handed to workers, one at a time each; a worker that dies is replaced and its mask measured again."""

import collections
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

from ppf.errors import ResourceError
from ppf.llm.engines.service import from_line, to_question
from ppf.samples import Measurement
from ppf.space.mask import Mask

TRIES = 3
"""Deaths of its worker after which a mask is a failure, and false starts after which a worker is given up."""


class Task(NamedTuple):
    """A mask that a worker measures; the answer to a task of an earlier, abandoned run is not wanted any more."""

    run: object
    place: int
    tries: int


class Worker(ABC):
    """Something that measures one mask at a time, and what it is working on. Its first answer says that it is ready."""

    def __init__(self) -> None:
        self.is_ready = False
        self.task: Task | None = None
        self._false_starts = 0

    @abstractmethod
    def send(self, question: str) -> None:
        """Asks."""

    @abstractmethod
    def receive(self) -> str | bytes | None:
        """The line that it answered; None if it is gone."""

    @abstractmethod
    def start(self) -> None:
        """Starts it."""

    @abstractmethod
    def close(self) -> None:
        """Ends it."""

    @abstractmethod
    def last_words(self) -> tuple[str, bool]:
        """What a dead one said last, and whether it ended by itself: it would do so again."""

    def read(self) -> Measurement | None:
        """The answer to the task; None if it is gone.

        Raises:
            PPFError: It refused, as another in its place would.
        """
        line = self.receive()
        if line is None:
            return None
        answer = from_line(line)
        self.is_ready, self.task = True, None
        return answer

    def replace(self) -> str:
        """Starts another in place of a dead one, and says what the dead one said last.

        Raises:
            ResourceError: It ended by itself before it was ready, or died so three times in a row.
        """
        words, by_itself = self.last_words()
        self._false_starts = 0 if self.is_ready else self._false_starts + 1
        if self._false_starts and (by_itself or self._false_starts == TRIES):
            raise ResourceError(f"a measuring process must start; it ended: {words}; see whether memory is short")
        self.close()
        self.is_ready, self.task = False, None
        self.start()
        return words


W = TypeVar("W", bound=Worker)


class Pool(ABC, Generic[W]):
    """An engine of workers."""

    def __init__(self) -> None:
        self.workers: list[W] = []

    @abstractmethod
    def heard(self) -> Sequence[W]:
        """Waits until workers have answered or died, and gives them."""

    def measure(
        self, masks: Sequence[Mask], part: str = "search", rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Measurement]]:
        """See ``Engine``. A mask whose worker dies three times is a failure.

        Raises:
            PPFError: A worker refused its model, its text or a mask.
            ResourceError: A worker cannot start.
        """
        run = object()
        questions = [to_question(mask, part, rows) for mask in masks]
        waiting = collections.deque(Task(run, index, 1) for index in range(len(masks)))
        for worker in self.workers:
            _give(worker, waiting, questions)
        while waiting or any(worker.task and worker.task.run is run for worker in self.workers):
            for worker in self.heard():
                task, answer = worker.task, worker.read()
                mine = task if task is not None and task.run is run else None
                if answer is None:
                    words = worker.replace()
                    if mine and mine.tries < TRIES:
                        waiting.appendleft(mine._replace(tries=mine.tries + 1))
                    elif mine:
                        yield mine.place, Measurement(math.nan, math.nan, 0, 0.0, f"its worker died {TRIES} times: {words}")
                elif mine:
                    yield mine.place, answer
                _give(worker, waiting, questions)

    def close(self) -> None:
        """Ends the workers."""
        for worker in self.workers:
            worker.close()


def _give(worker: Worker, waiting: collections.deque[Task], questions: Sequence[str]) -> None:
    if worker.is_ready and worker.task is None and waiting:
        worker.task = waiting.popleft()
        worker.send(questions[worker.task.place])
