"""bench: ways to choose what goes, compared on text that none of them has seen, each with what it cost.

    rules       what a heuristic reads off the dense model: no mask is run
    additive    the exact optimum of summed single-site damages: the probes of the fit, every ratio
    searches    random, evolution, CMA-ES; on true measurements, one ratio at a time, or on the predictor
    dynamic     the agent as it comes: the whole fit, every ratio
    nested      the same, what goes at one ratio being gone at every larger one
    static      the agent, refined and truly measured at one ratio

All share the study's calibration text, its exact budgets and its surgery, and, but for the two with an order of their own,
its importance. Each study keeps its cells, so that a bench that was stopped goes on.
"""

import shutil
import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ppf.artifact import read_json, write_json
from ppf.config import BenchConfig, Target
from ppf.config.checks import check_idle
from ppf.decide import Decider
from ppf.errors import DamagedError, InputError
from ppf.learn.agent import Agent
from ppf.learn.baselines import HEURISTICS
from ppf.learn.black_box import SEARCHES, Problem
from ppf.learn.objective import Objective, predicted
from ppf.llm.load import LoadedModel
from ppf.llm.scores import score_units
from ppf.llm.statistics import layer_statistics
from ppf.lock import locked
from ppf.progress import Progress
from ppf.provenance import own_name
from ppf.recipes.cells import cell_key, taught_by
from ppf.recipes.fit import additive_agent
from ppf.recipes.lab import Lab, load_for, settings_of
from ppf.recipes.refine import FINALISTS, refined
from ppf.recipes.summary import summarise
from ppf.samples import Measurement
from ppf.space.allocation import Allocation, allocate
from ppf.space.importance import Importance
from ppf.space.mask import Mask, select
from ppf.space.policy import Policy
from ppf.space.statistics import Statistics
from ppf.study import mark_of

OWN_ORDER = {"wanda_sp": ("wanda_sp", "uniform"), "flap_own_order": ("flap", "flap")}
"""Methods that bring their importance: (score, heuristic)."""
ON_PREDICTOR = "_on_predictor"
METHODS = (
    *HEURISTICS,
    *OWN_ORDER,
    "additive",
    *SEARCHES,
    *(name + ON_PREDICTOR for name in SEARCHES),
    "nested",
    "dynamic",
    "static",
)
"""All names that a bench knows."""
PREDICTED_QUESTIONS = 20_000
_TIERS = (8, 2, 1)
"""Evolution asks on this fraction of the search text, from tier to tier."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What a method chose at one ratio.

    Attributes:
        mask: What stays.
        tokens: Run through the model for this ratio alone.
        shared: Run through the model once for all ratios.
        seconds: Wall time for this ratio alone.
    """

    mask: Mask
    tokens: int
    shared: int
    seconds: float


class Bench:
    """One study on the bench.

    Args:
        lab: Of a copy of the study: what is measured here must not teach it.
        decider: Of the same copy.
        loaded: The dense model.
        config: Of the bench.
    """

    def __init__(self, lab: Lab, decider: Decider, loaded: LoadedModel, config: BenchConfig) -> None:
        self.lab, self.decider, self.loaded, self.config = lab, decider, loaded, config
        self.layout, self.importance = lab.layout, decider.importance
        self.report = lab.study.report
        self.seed = lab.config.seed
        self.additive: Agent = additive_agent(lab)
        self._refined = self._refine_tokens()
        self._orders: dict[str, tuple[Importance, float]] = {}

    def prepare(self, names: Collection[str]) -> None:
        """Runs the dense model for what these methods read off it, before the measuring processes fill the memory."""
        if any(name in HEURISTICS or name in OWN_ORDER for name in names):
            _ = self.statistics
        for name in OWN_ORDER.keys() & names:
            self._order(OWN_ORDER[name][0])

    def choose(self, name: str, ratio: float) -> Choice:
        """What the method of that name, one of ``METHODS``, leaves of the model at a ratio."""
        if name in HEURISTICS:
            return self._rule(name, None, ratio)
        if name in OWN_ORDER:
            score, rule = OWN_ORDER[name]
            return self._rule(rule, score, ratio)
        if (search := name.removesuffix(ON_PREDICTOR)) in SEARCHES:
            return self._searched(search, search == name, ratio)
        if name in ("nested", "dynamic"):
            return self._dynamic(ratio, name == "nested")
        return {"additive": self._additive, "static": self._static}[name](ratio)

    @cached_property
    def statistics(self) -> Statistics:
        """What the rules read, computed when the first one asks."""
        path = self.lab.study.path("statistics")
        if not path.is_file():
            with self.lab.progress.stage("statistics"):
                layer_statistics(self.lab.model, self.layout, self.lab.text.calibration).save(path, self.layout)
        return Statistics.load(path, self.layout)

    def _order(self, score: str | None) -> tuple[Importance, float]:
        """An importance, and the seconds that scoring took."""
        if score is None or score == self.importance.method:
            return self.importance, 0.0
        if score not in self._orders:
            start, text = time.perf_counter(), self.lab.text.calibration
            found = score_units(self.lab.model, self.layout, text, score, self.importance.source, self.seed)
            self._orders[score] = found, time.perf_counter() - start
        return self._orders[score]

    def _mask(self, ratio: float, policy: Policy, importance: Importance) -> Mask:
        return select(allocate(policy, self.decider.budget(Target(ratio=ratio)), self.layout), importance, self.layout)

    def _rule(self, rule: str, score: str | None, ratio: float) -> Choice:
        importance, scoring = self._order(score)
        start = time.perf_counter() - scoring
        policy = HEURISTICS[rule](self.statistics, importance, self.layout, ratio)
        mask = self._mask(ratio, policy, importance)
        shared = self._order_tokens() if score is None else int(self.lab.text.calibration.size)
        return Choice(mask, 0, shared, time.perf_counter() - start)

    def _additive(self, ratio: float) -> Choice:
        start, probes = time.perf_counter(), self.lab.store.all("probe")
        mask = self._mask(ratio, self.additive.propose(ratio), self.importance)
        shared = self._order_tokens() + sum(sample.tokens for sample in probes)
        return Choice(mask, 0, shared, time.perf_counter() - start)

    def _dynamic(self, ratio: float, nested: bool = False) -> Choice:
        start, decision = time.perf_counter(), self.decider.decide(Target(ratio=ratio, nested=nested))
        return Choice(decision.mask, 0, self._fitted_tokens(), time.perf_counter() - start)

    def _static(self, ratio: float) -> Choice:
        start, target = time.perf_counter(), Target(ratio=ratio)
        decision = refined(self.decider, self.decider.decide(target), self.lab, target, self.config.candidates)
        tokens = self._refine_tokens()
        self._refined, before = tokens, self._refined  # what one ratio measured, the next one knows
        validated = FINALISTS * int(self.lab.text.validation.size)
        return Choice(decision.mask, tokens - before + validated, self._fitted_tokens() + before, time.perf_counter() - start)

    def _refine_tokens(self) -> int:
        return sum(sample.tokens for sample in self.lab.store.all("refine"))

    def _order_tokens(self) -> int:
        """What the study's importance took: the calibration, and the choice among several criteria."""
        return int(self.report["tokens"]["calibration"] + self.report["tokens"]["importance"])

    def _fitted_tokens(self) -> int:
        return int(sum(self.report["tokens"].values()))

    def _searched(self, name: str, truly: bool, ratio: float) -> Choice:
        start, search = time.perf_counter(), SEARCHES[name]
        if truly:
            asked = [Measured(self, size) for size in (_TIERS if name == "evolution" else (1,))]
            tiers = tuple((measured.ask, measured.cost) for measured in asked)
            budget = self.config.budget or self.report["tokens"]["measured"]
            with self.lab.progress.stage(f"{name} at {ratio:g}"):
                kept = search(self._problem(ratio, tiers, budget / self.lab.text.search.size))
            tokens, shared = sum(measured.tokens for measured in asked), self._order_tokens()
        else:
            kept = search(self._problem(ratio, ((predicted(self.decider.predictor), 1.0),), PREDICTED_QUESTIONS))
            tokens, shared = 0, self._fitted_tokens()
        return Choice(select(Allocation(kept), self.importance, self.layout), tokens, shared, time.perf_counter() - start)

    def _problem(self, ratio: float, tiers: tuple[tuple[Objective, float], ...], evaluations: float) -> Problem:
        """From the uniform policy, as the published searches begin."""
        remove = self.decider.budget(Target(ratio=ratio)).remove
        seed = int(np.random.default_rng([self.seed, remove]).integers(2**31))
        return Problem(tiers, self.layout, remove, np.full(len(self.layout.sites), 1 - ratio), evaluations, seed)

    def measure(self, choices: Sequence[Choice]) -> list[dict[str, Any]]:
        """What the choices do on the test text: per block log-perplexity above dense and KL divergence, nats/token."""
        found = self._tested([choice.mask for choice in choices])
        above = [np.subtract(result.losses, self._dense.losses) for result in found]
        return [
            {"above": above[place].round(6).tolist(), "kl": np.round(result.divergences, 6).tolist()}
            for place, result in enumerate(found)
        ]

    @cached_property
    def _dense(self) -> Measurement:
        return self._tested([Mask(tuple(np.ones(units, dtype=bool) for units in self.layout.units))])[0]

    def _tested(self, masks: Sequence[Mask]) -> list[Measurement]:
        found = self.lab.answers(masks, "test")
        for result in found:
            if result.reason:
                raise DamagedError(f"the test text must be measurable; {result.reason}; try another --device")
        return found


class Measured:
    """An objective that runs the model on an evenly spread part of the search text, and counts the tokens.

    Args:
        bench: Where.
        fraction: One block in so many.
    """

    def __init__(self, bench: Bench, fraction: int) -> None:
        self._bench = bench
        blocks = len(bench.lab.text.search)
        self._rows = list(range(fraction // 2, blocks, fraction)) or [0]
        self.cost = len(self._rows) / blocks
        self.tokens = 0

    def ask(self, kept: np.ndarray) -> np.ndarray:
        """An ``Objective``: damage, infinite where there is none."""
        masks = [select(Allocation(row), self._bench.importance, self._bench.layout) for row in kept]
        results = self._bench.lab.answers(masks, "search", self._rows)
        self.tokens += sum(result.tokens for result in results)
        return np.array([result.kl if np.isfinite(result.kl) else np.inf for result in results])


def bench(config: BenchConfig, progress: Progress) -> dict[str, Any]:
    """Compares methods.

    Args:
        config: Studies, methods, ratios and budgets.
        progress: Shows what happens.

    Returns:
        The JSON-ready results; see ``summary.summarise``.

    Raises:
        InputError: A study that is not fitted, of another model than the first or of its seed, or an unknown method.
        InUseError: Another process fits or benches one of them.
    """
    if unknown := set(config.methods) - set(METHODS):
        raise InputError(f"--methods must be of {', '.join(METHODS)}; {min(unknown)!r} came; choose among them")
    _check_idle(config)
    deciders = [Decider(folder) for folder in config.studies]
    seeds = _checked_seeds(deciders, config)
    first = deciders[0].study.record
    loaded = load_for(first["model"]["name"], progress)
    cells = [cell for decider in deciders for cell in _cells(decider, loaded, config, progress)]
    settings = first["settings"]
    return {
        "model": own_name(first["model"]["name"]),
        "text": own_name(settings["test_text"] or settings["text"]),
        "test_tokens": first["dense"]["test"]["tokens"],
        "search_tokens": first["dense"]["search"]["tokens"],
        "dense_ppl": [float(np.exp(decider.dense_log_ppl)) for decider in deciders],
        "samples": settings["samples"],
        "seeds": seeds,
        "heldout": [decider.report["heldout"] for decider in deciders],
        "rows": summarise(cells, "static"),
    }


def _checked_seeds(deciders: Sequence[Decider], config: BenchConfig) -> list[int]:
    """Of the studies, which must be of one model, differ in their seed, and allow every ratio."""
    digest = deciders[0].study.record["model"]["digest"]
    for decider in deciders:
        if decider.study.record["model"]["digest"] != digest:
            raise InputError(f"all studies must be of one model; {decider.study.folder} is of another; bench it by itself")
        for ratio in config.ratios:
            decider.budget(Target(ratio=ratio))
    seeds = [decider.study.record["settings"]["seed"] for decider in deciders]
    if len(set(seeds)) < len(seeds):
        raise InputError(f"studies of one bench must differ in their seed; seeds {seeds} came; fit one again with another --seed")
    return seeds


def _check_idle(config: BenchConfig) -> None:
    """Refuses options that do nothing for the chosen methods."""
    methods = config.methods or METHODS
    if "static" not in methods:
        check_idle(config, ("candidates",), "static among the --methods; it is not")
    if not set(SEARCHES) & set(methods):
        check_idle(config, ("budget",), f"{', '.join(SEARCHES)} among the --methods; none is")


def _cells(decider: Decider, loaded: LoadedModel, config: BenchConfig, progress: Progress) -> list[dict[str, Any]]:
    """All cells of one study, those at hand taken from it; another bench of it has to wait."""
    study = decider.study
    path = study.folder / "bench.json"
    with locked(study.folder), tempfile.TemporaryDirectory() as temporary:
        if mark_of(study.folder) != decider.mark:
            raise DamagedError(f"{study.folder} must stay as it is while it is benched; it was fitted anew; run ppf bench again")
        cells: dict[str, dict[str, Any]] = read_json(path) if path.is_file() else {}
        copy = Path(shutil.copytree(study.folder, Path(temporary) / "study"))
        settings = settings_of(study, study=str(copy), device=config.device, workers=config.workers)
        with Lab(loaded, settings, progress) as lab:
            lab.open_study()
            found = Bench(lab, Decider(copy), loaded, config)
            names = config.methods or METHODS
            taught = taught_by(study)
            wanted = {cell_key(name, ratio, config, taught): (name, ratio) for ratio in config.ratios for name in names}
            found.prepare({name for key, (name, _) in wanted.items() if key not in cells})
            with progress.stage(f"bench of seed {found.seed}", len(wanted)) as advance:
                for key, (name, ratio) in wanted.items():
                    if key not in cells:
                        cells[key] = _cell(found, name, ratio)
                        write_json(path, cells)
                    advance(_best_so_far(ratio, [cells[other] for other in wanted if other in cells]))
    return [cells[key] for key in wanted]


def _cell(found: Bench, name: str, ratio: float) -> dict[str, Any]:
    choice = found.choose(name, ratio)
    (measured,) = found.measure([choice])
    return {
        "method": name, "ratio": ratio, "seed": found.seed, "kept": choice.mask.allocation.kept.tolist(),
        "tokens": choice.tokens, "shared_tokens": choice.shared, "seconds": round(choice.seconds, 3), **measured,
    }  # fmt: skip


def _best_so_far(ratio: float, cells: Sequence[dict[str, Any]]) -> str:
    """The method with the least log-perplexity at a ratio, in words."""
    least, method = min((float(np.mean(cell["above"])), cell["method"]) for cell in cells if cell["ratio"] == ratio)
    return f"best at {100 * ratio:g} %: {method}, {least:+.4f}"
