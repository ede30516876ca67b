"""What measuring needs, opened once: the model, its text, the study folder, the store and the engine."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ppf.config import FitConfig
from ppf.errors import DamagedError, InputError
from ppf.llm.collect import Failures, Wanted, collect
from ppf.llm.depth import with_depth
from ppf.llm.engines.bench import Engine, InProcessEngine
from ppf.llm.engines.local import LocalEngine
from ppf.llm.engines.ray_cluster import Cluster, RayEngine, import_ray
from ppf.llm.load import LoadedModel, load_model
from ppf.llm.perplexity import Evaluation, evaluate
from ppf.llm.placement import give_memory_back, is_spread
from ppf.llm.scores import score_units
from ppf.llm.text import Text, TextSizes, load_text
from ppf.progress import Progress
from ppf.recipes.choices import (
    TOKENS_PER_BATCH,
    check_named,
    choose_dtype,
    choose_placement,
    choose_seq_len,
    choose_workers,
    tokens_per_batch,
)
from ppf.recipes.protocol import check_protocol, protocol_of
from ppf.samples import Measurement, Sample
from ppf.space.allocation import Allocation
from ppf.space.importance import Importance
from ppf.space.layout import Layout
from ppf.space.mask import Mask, select
from ppf.study import StudyFolder, context_of

_WATCHED_RATIO, _WATCHED_WIDTH = 0.3, 0.03
_TRIED_SCORES = ("taylor", "wanda_sp", "flap")
_DECISIVE = (
    "text", "test_text", "score", "seq_len", "calibration_tokens", "search_tokens", "validation_tokens", "test_tokens", "dtype",
    "seed", "samples", "rounds", "max_ratio", "depth",
)  # fmt: skip


class Lab:
    """A model on the bench. Closing it ends the measuring processes.

    Args:
        loaded: The dense model.
        config: Of the fit.
        progress: Shows what happens.
    """

    def __init__(self, loaded: LoadedModel, config: FitConfig, progress: Progress) -> None:
        self.loaded, self.config, self.progress = loaded, config, progress
        self.layout = layout_for(config, loaded)
        self._where = choose_placement(config.device)
        self.device = self._where.device
        self.dtype = choose_dtype(config.dtype, self.device, loaded.dtype)
        if (Path(config.study) / "study.json").exists():  # wherever it goes on, a study measures in one precision
            self.dtype = getattr(torch, StudyFolder(config.study).record["dtype"], self.dtype)
        self._model: PreTrainedModel | None = loaded.on(self._where, self.dtype)
        self.batch = tokens_per_batch(self.device)
        self.reference_tokens = 0
        self._best = math.inf
        self._failures = Failures()
        self._engine: Engine | None = None
        self._stack = contextlib.ExitStack()

    @property
    def model(self) -> PreTrainedModel:
        """The dense model, in the precision to measure in."""
        if self._model is None:
            self._model = self.loaded.on(self._where, self.dtype)
        return self._model

    def __enter__(self) -> "Lab":
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def open_study(self) -> StudyFolder:
        """The study folder, new or continued; text and dense figures are made when it is new.

        Raises:
            InputError: A study of other settings.
            DamagedError: A study of another model, or whose text was exchanged.
        """
        folder = Path(self.config.study)
        if (folder / "study.json").exists():
            self.study = StudyFolder(folder)
            self._check_same()
            path, whole = self.study.path("text"), self.study.path("text").exists()
            self.text = Text.load(path, self.layout.fingerprint) if whole else self._new_text(self.study.record["seq_len"])
            check_protocol(self.study, protocol_of(self.loaded, self.text, self.dtype))
            if self._context() != self.study.context:
                raise DamagedError(
                    f"{folder} must measure as it began; its text or its precision changed; fit again in a new folder"
                )
            if not whole:
                self.text.save(path, self.layout.fingerprint)
        else:
            self.study = self._create(folder)
        self.store = self._stack.enter_context(contextlib.closing(self.study.store(write=True)))
        self._seconds_before: dict[str, float] = self.study.plan("seconds") or {}
        if not self._seconds_before:
            self.keep_seconds()
        return self.study

    def score(self) -> None:
        """Importance, unless it is there."""
        if self.study.path("importance").is_file():
            return
        give_memory_back()  # the dense figures took as much as the scores are about to
        names = _TRIED_SCORES if self.config.score == "auto" else (self.config.score,)
        text, source, seed, orders = self.text.calibration, self.config.text, self.config.seed, []
        with self.progress.stage("importance", len(names)) as advance:
            for name in names:
                orders.append(score_units(self.model, self.layout, text, name, source, seed))
                advance(name)
        best = self._best_of_each_site(orders) if len(orders) > 1 else orders[0]
        best.save(self.study.path("importance"), self.layout)
        self.keep_seconds()

    def _best_of_each_site(self, orders: Sequence[Importance]) -> Importance:
        """Each site takes the order that does the least damage when half of its units go, and all others stay."""
        layout = self.layout
        halves = np.tile(layout.units, (len(layout.sites), 1))
        np.fill_diagonal(halves, np.maximum(layout.floors, layout.units // 2))
        masks = [select(Allocation(kept), order, layout) for order in orders for kept in halves]
        with self.progress.stage("choosing importance", len(masks)) as advance:
            answers = self.answers(masks, "search", advance=advance)
        damage: np.ndarray = np.reshape([answer.kl if np.isfinite(answer.kl) else np.inf for answer in answers], (len(orders), -1))
        chosen = [orders[index] for index in damage.argmin(axis=0)]
        self.study.keep_plan("importance", {"by_site": [order.method for order in chosen], "masks": len(answers)})
        method = "+".join(dict.fromkeys(order.method for order in chosen))
        return Importance(tuple(order.scores[site] for site, order in enumerate(chosen)), method, orders[0].source)

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
        samples = self.run(name, [Wanted(Allocation(allocation), purpose, ratio) for purpose, ratio, allocation in kept], round)
        self.keep_seconds()
        return samples

    def run(self, name: str, wanted: Sequence[Wanted], round: int) -> list[Sample]:
        """Measures masks, those at hand taken from the store."""
        with self.progress.stage(f"measuring {name}", len(wanted)) as advance:

            def count(sample: Sample) -> None:
                self._failures.count(sample)
                advance(self._best_so_far(sample))

            return list(collect(self._measuring, self.store, wanted, self.study.importance, self.layout, round, count))

    def _best_so_far(self, sample: Sample) -> str:
        """The least rise in log-perplexity near one ratio, in words; across ratios no sample is better than another."""
        ratio = min(_WATCHED_RATIO, round(self.config.max_ratio / 2, 2))
        if sample.status == "done" and sample.purpose != "probe" and abs(sample.ratio - ratio) <= _WATCHED_WIDTH:
            self._best = min(self._best, sample.log_ppl - self.study.record["dense"]["search"]["log_ppl"])
        return f"best at {100 * ratio:.0f} %: {self._best:+.4f}" if math.isfinite(self._best) else ""

    def answers(
        self, masks: Sequence[Mask], part: str, rows: Sequence[int] | None = None, advance: Callable[[], None] = lambda: None
    ) -> list[Measurement]:
        """Measures masks and keeps nothing.

        Args:
            masks: Which units stay.
            part: ``"search"``, ``"validation"`` or ``"test"``.
            rows: Only these blocks of it.
            advance: Told of each that is measured, for progress.
        """
        found = {}
        for place, result in self._measuring().measure(masks, part, rows):
            found[place] = result
            advance()
        return [found[place] for place in range(len(masks))]

    def keep_seconds(self) -> dict[str, float]:
        """Keeps the wall time of each stage, summed over all starts of the fit."""
        seconds = {name: round(value, 2) for name, value in self.progress.seconds.items()}
        for name, value in self._seconds_before.items():
            seconds[name] = round(seconds.get(name, 0.0) + value, 2)
        self.study.keep_plan("seconds", seconds)
        return seconds

    def evaluate_dense(self, text: Text, part: str) -> Evaluation:
        """The dense model on a part of a text."""
        return evaluate(self.model, getattr(text, part), self.batch)

    def _measuring(self) -> Engine:
        if self._engine is None:
            engine, workers = self._ray() if self.config.engine == "ray" else self._here()
            self.reference_tokens += workers * self.text.search.size
            self._engine = self._stack.enter_context(contextlib.closing(engine))
        elif self._model is not None and not isinstance(self._engine, InProcessEngine):
            self._rest()  # something has asked for the model since the others filled the memory
        return self._engine

    def _here(self) -> tuple[Engine, int]:
        folder = self.loaded.folder
        if self.device.type != "cpu" or folder is None or is_spread(self.model):
            if self.config.workers is not None:
                self.progress.say(
                    "--workers has no effect: the model is on an accelerator, spread or an object, and one process measures"
                )
            return InProcessEngine(self.model, self.layout, self.text, self.batch), 1
        self._rest()
        workers = choose_workers(self.config.workers, self.layout.total * self.dtype.itemsize)
        return LocalEngine(folder, self.study.path("text"), self.layout, _name(self.dtype), workers, self.batch), workers

    def _rest(self) -> None:
        """Leaves the memory to other processes: they have the model now, and here it is not needed until something asks for it."""
        self._model = None
        self.loaded.spread.clear()
        self.loaded.rest()
        give_memory_back()

    def _ray(self) -> tuple[Engine, int]:
        config, loaded = self.config, self.loaded
        gpus, workers = config.gpus_per_worker or 0.0, config.workers
        self._rest()
        if config.ray_address is None and not gpus:  # all on this machine, where memory bounds them too
            workers = choose_workers(workers, self.layout.total * self.dtype.itemsize)
        batch = TOKENS_PER_BATCH["cuda" if gpus else "cpu"]
        text, cluster = self.study.path("text"), Cluster(config.ray_address, workers, gpus)
        engine = RayEngine(_address(loaded), loaded.digest, text, self.layout, _name(self.dtype), batch, cluster)
        self.progress.say(engine.where)
        return engine, len(engine.workers)

    def _create(self, folder: Path) -> StudyFolder:
        config = self.config
        length = choose_seq_len(config.seq_len, self.model.config.max_position_embeddings)
        self.text = self._new_text(length)
        with self.progress.stage("dense model"):
            dense = {part: _record(self.evaluate_dense(self.text, part)) for part in ("search", "test")}
        if dense["search"]["log_ppl"] >= math.log(self.loaded.model.config.vocab_size):
            self.progress.say("warning: the dense model is no better than guessing tokens; are text and tokenizer its own?")
        self.text.save(folder / "text.safetensors", self.layout.fingerprint)
        loaded = self.loaded
        model: dict[str, Any] = {
            "name": _address(loaded), "digest": loaded.digest, "type": self.layout.model_type,
            "bytes_per_param": loaded.dtype.itemsize,
        }  # fmt: skip
        record = {
            "model": model,
            "layout": self.layout.to_json(),
            "settings": asdict(config),
            "dense": dense,
            "context": self._context(),
            "seq_len": length,
            "dtype": _name(self.dtype),
            "protocol": protocol_of(self.loaded, self.text, self.dtype),
            "made_by": {"ppf": version("ppf")},
        }
        return StudyFolder.create(folder, record)

    def _new_text(self, length: int) -> Text:
        config = self.config
        sizes = TextSizes(length, config.calibration_tokens, config.search_tokens, config.validation_tokens, config.test_tokens)
        with self.progress.stage("text"):
            return load_text(config.text, self.loaded.tokenizer, sizes, config.seed, self.model, config.test_text)

    def _context(self) -> str:
        return context_of(model=self.loaded.digest, text=self.text.digest, dtype=str(self.dtype))

    def _check_same(self) -> None:
        settings, model = self.study.record["settings"], self.study.record["model"]
        if model["digest"] != self.loaded.digest:
            raise DamagedError(
                f"{self.config.study} must be a study of this model; it is one of {model['name']} as it was then; use a new folder"
            )
        for name in _DECISIVE:
            came, was = getattr(self.config, name), settings.get(name, getattr(FitConfig, name, None))
            if came != was:
                flag = "--" + name.replace("_", "-")
                raise InputError(f"a continued study must keep {flag} {was}; {came} came; leave it as it was or use a new folder")


def settings_of(study: StudyFolder, /, **changes: Any) -> FitConfig:
    """The settings of a study's fit for measuring more on this machine, wherever the fit itself measured."""
    here = {"engine": "local", "ray_address": None, "gpus_per_worker": None}
    return FitConfig(**{**study.record["settings"], **here, **changes})


def layout_for(config: FitConfig, loaded: LoadedModel) -> Layout:
    """The layout that a fit works with.

    Raises:
        UnsupportedError: Depth is asked for, and the model cannot lose sub-layers.
    """
    return with_depth(loaded.model, loaded.layout) if config.depth else loaded.layout


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _address(loaded: LoadedModel) -> str:
    """Where the model is found again, from any folder."""
    return str(Path(loaded.name).resolve()) if loaded.name and Path(loaded.name).is_dir() else loaded.name


def _record(evaluation: Evaluation) -> dict[str, Any]:
    return {**vars(evaluation), "interval": list(evaluation.interval), "blocks": evaluation.blocks.tolist()}


def check_engine(config: FitConfig, given: LoadedModel | None) -> None:
    """Refuses an engine that cannot work, before a model is loaded.

    Raises:
        InputError: Ray, and a model that lies nowhere, or whose cluster would let everyone in.
        ResourceError: Ray is not installed.
    """
    if config.engine == "ray":
        if given is not None and given.folder is None:
            raise InputError("--engine ray must have a model that each node can read; an object came; give its folder or hub id")
        import_ray(config.ray_address)


def load_for(name: str, progress: Progress) -> LoadedModel:
    """Loads a model under a progress stage.

    Raises:
        InputError: The study was fitted to an object that came from no folder.
    """
    check_named(name)
    with progress.stage("loading"):
        return load_model(name)
