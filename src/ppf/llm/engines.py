"""Where masks are measured: in this process, or in a pool of one-thread processes. Same function, same results.

A worker is a plain `python -m ppf.llm.engines` that speaks JSON lines over its pipes, `{}` when it is ready and then one a
mask: nothing is pickled, a script needs no main guard, a worker that dies is replaced and its mask measured again, and
one whose pipe closes, as when its parent dies, ends after the mask in hand.
"""

import base64
import collections
import contextlib
import json
import math
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from transformers import PreTrainedModel

from ppf.errors import ResourceError
from ppf.llm.load import convert, load_model, quiet_transformers
from ppf.llm.masking import masked, narrowed
from ppf.llm.perplexity import Reference, measure, reference_of
from ppf.llm.text import Text
from ppf.samples import Measurement
from ppf.space.layout import Layout
from ppf.space.mask import Mask

_TRIES = 3
_READY = "{}"
_MALLOC = str(2**32 - 1)


class Engine(Protocol):
    """Measures masks of one model on one text."""

    def measure(
        self, masks: Sequence[Mask], part: str = "search", rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Measurement]]:
        """Measures masks on a part of the text.

        Args:
            masks: Which units stay.
            part: ``"search"``, ``"validation"`` or ``"test"``.
            rows: Only these blocks of the part.

        Yields:
            (Index into ``masks``, result) as results come, each index once; a failure is a result with a reason.
        """
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


class Bench:
    """A dense model, its text, and its answers on each part, which are computed when they are first needed.

    Args:
        model: The dense model, in the dtype to measure in.
        layout: Its layout.
        text: What to measure on.
        tokens_per_batch: How many tokens go through the model at once.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, text: Text, tokens_per_batch: int) -> None:
        self._model, self._layout, self._text, self._batch = model, layout, text, tokens_per_batch
        self._references: dict[str, Reference] = {}
        # Arithmetic is what a CPU is short of, memory what an accelerator is.
        self._pruned = narrowed if model.device.type == "cpu" else masked

    def prepare(self, part: str) -> Reference:
        """The dense model's answers on a part."""
        if part not in self._references:
            self._references[part] = reference_of(self._model, getattr(self._text, part), self._batch)
        return self._references[part]

    def measure(self, mask: Mask, part: str, rows: Sequence[int] | None) -> Measurement:
        """Runs the masked model over the blocks; too little memory is a result with a reason."""
        start = time.perf_counter()
        blocks = getattr(self._text, part)
        try:
            reference = self.prepare(part)
            if rows is not None:
                blocks, reference = blocks[list(rows)], reference.of(rows)
            with self._pruned(self._model, self._layout, mask):
                losses, divergences = measure(self._model, blocks, reference, self._batch)
        except ResourceError as error:
            return Measurement(math.nan, math.nan, 0, time.perf_counter() - start, str(error))
        seconds = time.perf_counter() - start
        each = tuple(losses.tolist()), tuple(divergences.tolist())
        return Measurement(float(losses.mean()), float(divergences.mean()), blocks.size, seconds, "", *each)


class InProcessEngine:
    """Measures here: for accelerators, and for models that exist only as objects. Arguments as in ``Bench``."""

    def __init__(self, model: PreTrainedModel, layout: Layout, text: Text, tokens_per_batch: int) -> None:
        self._bench = Bench(model, layout, text, tokens_per_batch)
        self._bench.prepare("search")

    def measure(
        self, masks: Sequence[Mask], part: str = "search", rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Measurement]]:
        """See ``Engine``."""
        for index, mask in enumerate(masks):
            yield index, self._bench.measure(mask, part, rows)

    def close(self) -> None:
        """See ``Engine``."""


class LocalEngine:
    """A pool of one-thread processes, each with the model.

    Args:
        folder: Of the model's files.
        text: Artefact of the text to measure on.
        layout: Of the dense model.
        dtype: Torch dtype to measure in, by name.
        workers: How many processes.
        tokens_per_batch: As in ``Bench``.

    Raises:
        ResourceError: A process cannot be started.
    """

    def __init__(self, folder: Path, text: Path, layout: Layout, dtype: str, workers: int, tokens_per_batch: int) -> None:
        self._layout = layout
        self._setup = {
            "folder": str(folder),
            "text": str(text),
            "fingerprint": layout.fingerprint,
            "dtype": dtype,
            "tokens_per_batch": tokens_per_batch,
        }
        self._workers: list[_Worker] = []
        try:
            for _ in range(workers):
                self._workers.append(_Worker(self._setup))
        except BaseException:
            self.close()
            raise

    def measure(
        self, masks: Sequence[Mask], part: str = "search", rows: Sequence[int] | None = None
    ) -> Iterator[tuple[int, Measurement]]:
        """See ``Engine``. A mask whose worker dies three times is a failure.

        Raises:
            ResourceError: A worker cannot start.
        """
        run = object()
        questions = [{"mask": base64.b64encode(mask.pack()).decode(), "part": part, "rows": rows} for mask in masks]
        waiting = collections.deque(_Task(run, index, 1) for index in range(len(masks)))
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.answers, selectors.EVENT_READ, worker)
                _give(worker, waiting, questions)
            while waiting or any(worker.task and worker.task.run is run for worker in self._workers):
                for key, _ in selector.select():
                    worker, task = key.data, key.data.task
                    answer = worker.read()
                    mine = task is not None and task.run is run
                    if answer is None:
                        selector.unregister(worker.answers)
                        words = worker.replace()
                        selector.register(worker.answers, selectors.EVENT_READ, worker)
                        if mine and task.tries < _TRIES:
                            waiting.appendleft(task._replace(tries=task.tries + 1))
                        elif mine:
                            yield task.place, Measurement(math.nan, math.nan, 0, 0.0, f"its worker died {_TRIES} times: {words}")
                    elif mine:
                        yield task.place, answer
                    _give(worker, waiting, questions)

    def close(self) -> None:
        """Ends the workers."""
        for worker in self._workers:
            worker.close()


class _Task(NamedTuple):
    """A mask that a worker measures; the answer to a task of an earlier, abandoned run is not wanted any more."""

    run: object
    place: int
    tries: int


def _give(worker: "_Worker", waiting: collections.deque[_Task], questions: Sequence[dict[str, Any]]) -> None:
    if worker.is_ready and worker.task is None and waiting:
        worker.task = waiting.popleft()
        worker.send(questions[worker.task.place])


class _Worker:
    """One process and what it is working on."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._setup, self._false_starts = setup, 0
        self._start()

    def _start(self) -> None:
        # glibc gives large buffers back to the kernel at every step; raising its thresholds saves the page faults.
        extra = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": _MALLOC, "MALLOC_TRIM_THRESHOLD_": _MALLOC}
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
        with contextlib.ExitStack() as on_error:
            try:
                self._errors = on_error.enter_context(tempfile.TemporaryFile())
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "ppf.llm.engines"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    env={**os.environ, **extra, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
                    start_new_session=True,
                )
            except OSError as error:
                reason = f"{error.strerror}; free memory or give fewer --workers"
                raise ResourceError(f"a measuring process must start; {reason}") from error
            on_error.pop_all()
        assert self._process.stdin is not None and self._process.stdout is not None  # both are pipes
        self._questions, self.answers = self._process.stdin, self._process.stdout
        self.is_ready = False
        self.task: _Task | None = None
        self.send(self._setup)

    def replace(self) -> str:
        """Starts another process in place of a dead one, and says what the dead one said last.

        Raises:
            ResourceError: It ended by itself before it was ready, or was killed so three times in a row.
        """
        status, words = self._process.wait(), self._last_words()
        self._false_starts = 0 if self.is_ready else self._false_starts + 1
        if self._false_starts and (status >= 0 or self._false_starts == _TRIES):
            raise ResourceError(f"a measuring process must start; it ended: {words}; see whether memory is short")
        self.close()
        self._start()
        return words

    def send(self, record: dict[str, Any]) -> None:
        try:
            self._questions.write((json.dumps(record) + "\n").encode())
            self._questions.flush()
        except BrokenPipeError:
            pass  # its end is seen when its answer is read

    def read(self) -> Measurement | None:
        """The answer to the task; None if the process is gone. The first answer says that it is ready, and nothing else."""
        line = self.answers.readline()
        if not line.endswith(b"\n"):
            return None
        self.is_ready, self.task = True, None
        return _from_line(line)

    def _last_words(self) -> str:
        """The last line that the process wrote to its error stream, and how it ended."""
        self._errors.seek(0)
        lines = self._errors.read()[-2000:].decode(errors="replace").strip().splitlines()
        code = self._process.poll()
        return f"{lines[-1][:200] if lines else 'no message'} (status {code})"

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        with contextlib.suppress(BrokenPipeError):  # what a dead process did not read
            self._questions.close()
        self.answers.close()
        self._errors.close()


def _to_line(result: Measurement) -> str:
    """Strict JSON: what is not finite becomes null."""

    def strict(value: Any) -> Any:
        if isinstance(value, tuple):
            return [strict(each) for each in value]
        return value if isinstance(value, str) or math.isfinite(value) else None

    return json.dumps({name: strict(value) for name, value in vars(result).items()})


def _from_line(line: str | bytes) -> Measurement:
    """The inverse, with NaN for null; the line of a worker that is ready gives an empty measurement."""

    def loose(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(loose(each) for each in value)
        return math.nan if value is None else value

    fields: dict[str, Any] = {"log_ppl": None, "kl": None, "tokens": 0, "seconds": 0.0, **json.loads(line)}
    return Measurement(**{name: loose(value) for name, value in fields.items()})


def _serve() -> None:
    """The worker's loop: a set-up line, then a mask a line in and a measurement a line out."""
    quiet_transformers()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints must not mix with the answers
    torch.set_num_threads(1)
    setup = json.loads(sys.stdin.readline())
    loaded = load_model(setup["folder"])
    model = convert(loaded.model, torch.device("cpu"), getattr(torch, setup["dtype"]))
    bench = Bench(model, loaded.layout, Text.load(Path(setup["text"]), setup["fingerprint"]), setup["tokens_per_batch"])
    bench.prepare("search")
    print(_READY, file=answers, flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        mask = Mask.unpack(base64.b64decode(question["mask"]), loaded.layout)
        print(_to_line(bench.measure(mask, question["part"], question["rows"])), file=answers, flush=True)


if __name__ == "__main__":
    _serve()
