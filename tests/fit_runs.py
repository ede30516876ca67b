"""Fits of a tiny model, to go on with and to stop."""

import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import ppf
import tiny_models
from ppf.errors import DamagedError
from ppf.study import StudyFolder

SETTINGS = {
    "samples": 60, "rounds": 2, "calibration_tokens": 128, "search_tokens": 256, "test_tokens": 512, "seq_len": 16, "device": "cpu",
}  # fmt: skip


def again(folder: Path, text: Any = None, **changes: Any) -> ppf.Study:
    """The fit of a study once more; of a text that its record does not tell if it is given."""
    text = text or StudyFolder(folder).record["settings"]["text"]
    settings = {**SETTINGS, "text": str(text), "quiet": True, **changes}
    return ppf.fit(tiny_models.model("llama-mha"), tokenizer=tiny_models.tokenizer(), study=folder, **settings)


def command(place: Path, study: Path) -> list[str]:
    """A fit of a model in a folder as a process, long enough to be stopped in the middle."""
    flags = {**SETTINGS, "samples": 240, "workers": 1, "search_tokens": 8192}
    words = [word for name, value in flags.items() for word in ("--" + name.replace("_", "-"), str(value))]
    files = ["--study", str(study), "--text", str(place / "long.txt")]
    return [sys.executable, "-m", "ppf", "fit", str(place / "model"), *files, *words]


def hears_ctrl_c() -> None:
    """Whoever runs the tests in the background has its children ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def measured(study: Path) -> list[str]:
    """Digests in the order in which they were measured."""
    if not (study / "study.json").exists() or not (study / "samples.sqlite").exists():
        return []
    try:
        with closing(StudyFolder(study).store()) as store:
            return [one.digest for one in store.all()]
    except DamagedError:  # its table is not there yet
        return []
