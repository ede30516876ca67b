"""What a worker does, wherever it runs: it opens a model and answers lines. All that travels is text: JSON, a line each way.

set-up   {"folder", "text", "layout", "dtype", "device", "tokens_per_batch"}   ->  {} when it is ready
question {"mask", "part", "rows"}                                                   ->  a measurement
either   what any worker would refuse as well                                       ->  {"error", "message"}
"""

import base64
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ppf.errors import DamagedError, InputError, InUseError, NewerError, PPFError, ResourceError, UnsupportedError
from ppf.llm.engines.bench import Bench
from ppf.llm.load import load_model, quiet_transformers
from ppf.llm.placement import convert
from ppf.llm.text import Text
from ppf.samples import Measurement
from ppf.space.layout import Layout
from ppf.space.mask import Mask

READY = "{}"
MALLOC = str(2**32 - 1)
# glibc gives large buffers back to the kernel at every step; raising its thresholds saves the page faults.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": MALLOC,
    "MALLOC_TRIM_THRESHOLD_": MALLOC,
    "TOKENIZERS_PARALLELISM": "false",
}
"""Of a worker's process."""
_ERRORS = {kind.__name__: kind for kind in (InputError, UnsupportedError, DamagedError, NewerError, ResourceError, InUseError)}


class Service:
    """A model that answers questions.

    Args:
        setup: What to open: the first line that a worker is sent.

    Attributes:
        digest: Of the model; see ``model_digest``.

    Raises:
        PPFError: It cannot be opened.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        quiet_transformers()
        torch.set_num_threads(1)
        loaded = load_model(setup["folder"])
        model = convert(loaded.model, torch.device(setup["device"]), getattr(torch, setup["dtype"]))
        self.digest, self._layout = loaded.digest, Layout.from_json(setup["layout"])  # that of the fit, with its floors
        text = Text.load(Path(setup["text"]), self._layout.fingerprint)
        self._bench = Bench(model, self._layout, text, setup["tokens_per_batch"])
        self._bench.prepare("search")

    def answer(self, line: str) -> str:
        """The answer to a question."""
        question = json.loads(line)
        mask = Mask.unpack(base64.b64decode(question["mask"]), self._layout)
        return to_line(self._bench.measure(mask, question["part"], question["rows"]))


def to_question(mask: Mask, part: str, rows: Sequence[int] | None) -> str:
    """A mask to measure."""
    packed = base64.b64encode(mask.pack()).decode()
    return json.dumps({"mask": packed, "part": part, "rows": None if rows is None else [int(row) for row in rows]})


def to_line(result: Measurement) -> str:
    """Strict JSON: what is not finite becomes null."""

    def strict(value: Any) -> Any:
        if isinstance(value, tuple):
            return [strict(each) for each in value]
        return value if isinstance(value, str) or math.isfinite(value) else None

    return json.dumps({name: strict(value) for name, value in vars(result).items()})


def to_refusal(error: PPFError) -> str:
    """The line of a worker that refuses: another one would refuse the same."""
    return json.dumps({"error": type(error).__name__, "message": str(error)})


def from_line(line: str | bytes) -> Measurement:
    """The inverse, with NaN for null; the line of a worker that is ready gives an empty measurement.

    Raises:
        PPFError: The worker refused; of the kind and with the message that it raised.
    """

    def loose(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(loose(each) for each in value)
        return math.nan if value is None else value

    record: dict[str, Any] = json.loads(line)
    if "error" in record:
        raise _ERRORS[record["error"]](record["message"])
    fields = {"log_ppl": None, "kl": None, "tokens": 0, "seconds": 0.0, **record}
    return Measurement(**{name: loose(value) for name, value in fields.items()})
