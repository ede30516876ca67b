"""What measuring needs, opened once: the model, its text, the study folder, the store and the engine."""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ppf.config import FitConfig
from ppf.errors import DamagedError, InputError
from ppf.llm.collect import Wanted, collect
from ppf.llm.engines import Engine, InProcessEngine, LocalEngine
from ppf.llm.load import LoadedModel, load_model
from ppf.llm.perplexity import Evaluation, evaluate
from ppf.llm.scores import score_units
from ppf.llm.text import Text, TextSizes, load_text
from ppf.progress import Progress
from ppf.samples import Sample
from ppf.space.allocation import Allocation
from ppf.study import StudyFolder, context_of

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16_384, "mps": 4096}
_DECISIVE = ("text", "test_text", "score", "seq_len", "calibration_tokens", "search_tokens", "test_tokens", "dtype", "seed")


def choose_device(name: str) -> torch.device:
    """``auto`` is the first accelerator, or the CPU.

    Raises:
        InputError: No such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device must be one that is here; {name!r} came; use auto or cpu") from error


def choose_dtype(name: str, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """``auto`` is float32 on a CPU and the checkpoint's own elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else checkpoint
    return getattr(torch, name)


def default_seq_len(context: int) -> int:
    """Half of what the model was made for, 2,048 at most."""
    return max(8, min(2048, context // 2))


class Lab:
    """A model on the bench. Closing it ends the measuring processes.

    Args:
        loaded: The dense model.
        config: Of the fit.
        progress: Shows what happens.
    """

    def __init__(self, loaded: LoadedModel, config: FitConfig, progress: Progress) -> None:
        self.loaded, self.config, self.progress = loaded, config, progress
        self.layout = loaded.layout
        self.device = choose_device(config.device)
        self.dtype = choose_dtype(config.dtype, self.device, loaded.dtype)
        self.model = loaded.on(self.device, self.dtype)
        self.batch = TOKENS_PER_BATCH.get(self.device.type, 4096)
        self._engine: Engine | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def open_study(self) -> StudyFolder:
        """The study folder, new or continued; text and dense figures are made when it is new.

        Raises:
            InputError: A study of other settings.
            DamagedError: A study of another model.
        """
        folder = Path(self.config.study)
        if (folder / "study.json").exists():
            self.study = StudyFolder(folder)
            self._check_same()
            self.text = Text.load(self.study.path("text"), self.layout.fingerprint)
        else:
            self.study = self._create(folder)
        self.store = self._stack.enter_context(contextlib.closing(self.study.store(write=True)))
        return self.study

    def score(self) -> None:
        """Importance, unless it is there."""
        if self.study.path("importance").is_file():
            return
        with self.progress.stage("importance"):
            config = self.config
            importance = score_units(self.model, self.layout, self.text.calibration, config.score, config.text, config.seed)
            importance.save(self.study.path("importance"), self.layout)

    def measure(self, name: str, plan: Callable[[], Sequence[Wanted]], round: int) -> list[Sample]:
        """Measures what a stage wants; a stage that planned before goes on with its plan.

        Args:
            name: Of the stage.
            plan: Which masks; asked once in the life of the study.
            round: Kept with each sample.
        """
        kept = self.study.plan(name)
        if kept is None:
            kept = [[item.purpose, item.ratio, item.allocation.kept.tolist()] for item in plan()]
            self.study.keep_plan(name, kept)
        return self.run(name, [Wanted(Allocation(allocation), purpose, ratio) for purpose, ratio, allocation in kept], round)

    def run(self, name: str, wanted: Sequence[Wanted], round: int) -> list[Sample]:
        """Measures masks, those at hand taken from the store."""
        with self.progress.stage(f"measuring {name}", len(wanted)) as advance:
            return list(
                collect(self._measuring, self.store, wanted, self.study.importance, self.layout, round, lambda sample: advance())
            )

    def evaluate_dense(self, text: Text, part: str) -> Evaluation:
        """The dense model on a part of a text."""
        return evaluate(self.model, getattr(text, part), self.batch)

    def _measuring(self) -> Engine:
        if self._engine is None:
            folder = self.loaded.folder
            if self.device.type == "cpu" and folder is not None:
                workers = self.config.workers or len(os.sched_getaffinity(0))
                dtype = str(self.dtype).removeprefix("torch.")
                engine: Engine = LocalEngine(folder, self.study.path("text"), self.layout, dtype, workers, self.batch)
            else:
                engine = InProcessEngine(self.model, self.layout, self.text.search, self.batch)
            self._engine = self._stack.enter_context(contextlib.closing(engine))
        return self._engine

    def _create(self, folder: Path) -> StudyFolder:
        config = self.config
        length = config.seq_len or default_seq_len(self.model.config.max_position_embeddings)
        sizes = TextSizes(length, config.calibration_tokens, config.search_tokens, config.test_tokens)
        with self.progress.stage("text"):
            self.text = load_text(config.text, self.loaded.tokenizer, sizes, config.seed, self.model, config.test_text)
        with self.progress.stage("dense model"):
            dense = {part: _record(self.evaluate_dense(self.text, part)) for part in ("search", "test")}
        self.text.save(folder / "text.safetensors", self.layout.fingerprint)
        loaded = self.loaded
        model: dict[str, Any] = {
            "name": str(loaded.folder) if Path(loaded.name).is_dir() else loaded.name,
            "digest": loaded.digest,
            "type": self.layout.model_type,
            "bytes_per_param": loaded.dtype.itemsize,
        }
        context = context_of(model=loaded.digest, text=self.text.digest, dtype=str(self.dtype))
        record = {
            "model": model,
            "layout": self.layout.to_json(),
            "settings": asdict(config),
            "dense": dense,
            "context": context,
            "seq_len": length,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        return StudyFolder.create(folder, record)

    def _check_same(self) -> None:
        settings, model = self.study.record["settings"], self.study.record["model"]
        if model["digest"] != self.loaded.digest:
            raise DamagedError(
                f"{self.config.study} must be a study of this model; it is one of {model['name']} as it was then; use a new folder"
            )
        for name in _DECISIVE:
            came, was = getattr(self.config, name), settings[name]
            if came != was:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"a continued study must keep {flag} {was}; {came} came; leave it as it was or use a new folder")


def _record(evaluation: Evaluation) -> dict[str, Any]:
    return {"log_ppl": evaluation.log_ppl, "interval": list(evaluation.interval), "tokens": evaluation.tokens}


def check_study_place(folder: Path) -> None:
    """Refuses a folder that holds anything but a study, before anything is written into it.

    Raises:
        InputError: It holds something else, or is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} must be a folder; a file is there; choose another place")
    if not folder.is_dir() or (folder / "study.json").exists():
        return
    strangers = {entry.name for entry in folder.iterdir() if not entry.name.startswith(".")} - {"lock", "text.safetensors"}
    if strangers:
        raise InputError(f"{folder} must be a new or a study folder; it holds {min(strangers)!r}; choose another")


def load_for(name: str, progress: Progress) -> LoadedModel:
    """Loads a model under a progress stage."""
    with progress.stage("loading"):
        return load_model(name)
