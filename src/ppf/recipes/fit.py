"""fit: importance -> samples -> predictor -> agent, into a study folder that can be stopped and started at any point.

probes        each site alone at a few levels: the damage curves
spread        random policies of every ratio around the additive optimum
heldout       masks of one size at 20, 30, 40 and 50 %: predicted, never fitted
round 1..R    search on the predictor, measure what it found, fit again
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ppf.artifact import read_json, write_json
from ppf.config import FitConfig
from ppf.errors import InputError
from ppf.learn.agent import Prior
from ppf.learn.baselines import knapsack
from ppf.learn.fit_predictor import FITS, fit_curves, fit_predictor
from ppf.learn.metrics import figures, tau_near
from ppf.learn.objective import predicted
from ppf.learn.predictor import Predictor
from ppf.learn.search import refine
from ppf.learn.train_agent import AgentConfig, train_agent
from ppf.llm.collect import Wanted, probes, spread, stratified_ratios
from ppf.llm.load import LoadedModel
from ppf.progress import Progress
from ppf.recipes.lab import Lab, check_study_place, choose_device, leave_no_beginning, load_for
from ppf.samples import Sample, kept_matrix
from ppf.space.allocation import Allocation
from ppf.space.budget import Budget
from ppf.space.layout import Layout
from ppf.space.policy import Policy
from ppf.study import StudyFolder, locked

HELDOUT_RATIOS = (0.2, 0.3, 0.4, 0.5)
LOW_RATIO = 0.02
_HELDOUT_SHARE, _HELDOUT_MOST = 0.16, 24
_SPREAD_SHARE = 0.35
_SCALES = (0.03, 0.06, 0.12, 0.2)
_LEVELS = {1: (0.0,), 2: (0.5, 0.0), 3: (0.75, 0.4, 0.0), 4: (0.8, 0.5, 0.25, 0.0), 5: (0.9, 0.75, 0.5, 0.25, 0.0)}
_ROUND_RATIOS = 12
_SEARCH_STEPS = 24


def fit(config: FitConfig, progress: Progress, loaded: LoadedModel | None = None) -> StudyFolder:
    """Learns how to prune a model.

    Args:
        config: What to do.
        progress: Shows what happens.
        loaded: The dense model, if it is at hand; by default it is loaded.

    Returns:
        The fitted study; its ``report.json`` holds the predictor's held-out figures.

    Raises:
        InputError: Too few samples for this model, or a folder that holds something else.
        InUseError: Another process is fitting this study.
    """
    folder = Path(config.study)
    check_study_place(folder)
    loaded = loaded or load_for(config.model, progress)
    levels = _levels(loaded.layout, config.samples)
    choose_device(config.device)
    made = not folder.exists()
    with locked(folder):
        try:
            with Lab(loaded, config, progress) as lab:
                return _fit_all(lab, levels)
        finally:
            leave_no_beginning(folder, made)


def _fit_all(lab: Lab, levels: tuple[float, ...]) -> StudyFolder:
    study, config = lab.open_study(), lab.config
    if study.is_fitted and read_json(study.folder / "report.json")["settings"]["predictor"] == config.predictor:
        lab.progress.say(f"{study.folder} is fitted already")
        return study
    (study.folder / "report.json").unlink(missing_ok=True)  # until it is written again, the study answers nothing
    lab.score()
    _collect(lab, levels)
    predictors, report = _predictors(lab)
    predictor = predictors[report["predictor"]]
    predictor.save(study.path("predictor"), lab.layout)
    _agent(lab, predictor)
    write_json(study.folder / "report.json", {**report, "seconds": lab.keep_seconds(), "settings": asdict(config)})
    return study


def _levels(layout: Layout, samples: int) -> tuple[float, ...]:
    """Probe levels that take at most half of the samples."""
    for count in sorted(_LEVELS, reverse=True):
        if len(probes(layout, _LEVELS[count])) <= samples // 2:
            return _LEVELS[count]
    needed = 2 * len(probes(layout, _LEVELS[1]))
    sites = len(layout.sites)
    raise InputError(f"--samples must be at least {needed} for the {sites} sites of this model; {samples} came; raise it")


def _collect(lab: Lab, levels: tuple[float, ...]) -> None:
    """Measures everything that the predictor is fitted to and judged by."""
    config, layout = lab.config, lab.layout
    count = len(lab.measure("probes", lambda: probes(layout, levels), 0))
    count += len(lab.measure("heldout", lambda: _heldout(lab), 0))
    rest = max(config.samples - count, 8)
    first = rest if config.rounds == 0 else max(8, int(rest * _SPREAD_SHARE))
    lab.measure("spread", lambda: _spread(lab, first), 0)
    for round in range(1, config.rounds + 1):
        share = (rest - first) * round // config.rounds - (rest - first) * (round - 1) // config.rounds
        if share > 0:
            lab.measure(f"round {round}", partial(_found, lab, round, share), round)


def _rng(lab: Lab, stage: int) -> np.random.Generator:
    return np.random.default_rng([lab.config.seed, stage])


def _prior(lab: Lab) -> Prior:
    """The additive optimum for every ratio."""
    curves = fit_curves(lab.store.all("probe"), lab.store.failed(), lab.layout)
    return Prior.of(knapsack(curves, lab.layout), curves)


def _centres(lab: Lab, ratios: Sequence[float], rng: np.random.Generator) -> list[tuple[float, Policy]]:
    """Policies between the additive optimum and the uniform one."""
    prior = _prior(lab)
    rows, blend = prior.keep[prior.rows(np.array(ratios))], rng.beta(1.0, 2.0, len(ratios))
    return [(ratio, Policy((1 - b) * row + b * (1 - ratio))) for ratio, row, b in zip(ratios, rows, blend, strict=True)]


def _heldout(lab: Lab) -> list[Wanted]:
    rng, most = _rng(lab, 1), _most(lab)
    ratios = [ratio for ratio in HELDOUT_RATIOS if ratio <= most] or [round(most / 2, 3), round(most * 0.99, 3)]
    per_ratio = min(_HELDOUT_MOST, max(2, int(lab.config.samples * _HELDOUT_SHARE) // len(ratios)))
    return spread(lab.layout, _centres(lab, np.repeat(ratios, per_ratio).tolist(), rng), _SCALES, "heldout", rng)


def _spread(lab: Lab, count: int) -> list[Wanted]:
    rng = _rng(lab, 2)
    ratios = stratified_ratios(LOW_RATIO, _most(lab), count, rng).tolist()
    return spread(lab.layout, _centres(lab, ratios, rng), _SCALES, "spread", rng)


def _most(lab: Lab) -> float:
    """The largest ratio that is asked for and that the floors allow."""
    layout = lab.layout
    return min(lab.config.max_ratio, float((layout.units - layout.floors) @ layout.costs / layout.prunable) - 1e-6)


def _found(lab: Lab, round: int, count: int) -> list[Wanted]:
    """Per ratio what search on the predictor found, and masks near it."""
    rng, layout = _rng(lab, 10 + round), lab.layout
    kind = "corrected" if lab.config.predictor == "auto" else lab.config.predictor
    prior, wanted = _prior(lab), list[Wanted]()
    ratios = sorted(stratified_ratios(min(0.1, _most(lab) / 2), _most(lab), min(_ROUND_RATIOS, count), rng).tolist())
    with lab.progress.stage(f"search {round}", len(ratios)) as advance:
        objective = predicted(refit(lab, kind))
        for index, ratio in enumerate(ratios):
            share = count * (index + 1) // len(ratios) - count * index // len(ratios)
            budget = Budget.from_ratio(ratio, layout)
            starts = np.stack([prior.keep[prior.rows(np.array([ratio]))[0]], *incumbents(lab, ratio)])
            found, _ = refine(objective, starts, budget.remove, layout, _SEARCH_STEPS, rng)
            best = [Wanted(Allocation(row), "search", ratio) for row in found[: max(1, share // 3)]]
            centre = Policy(found[0] / layout.units)
            near = spread(layout, [(ratio, centre)] * (share - len(best)), _SCALES[:3], "search", rng)
            wanted += [*best, *near]
            advance()
    return wanted


def incumbents(lab: Lab, ratio: float) -> list[np.ndarray]:
    """Keep-ratios of the best measured masks near a ratio: least damage, with credit for having removed more."""
    near = [sample for sample in _fitted(lab) if sample.purpose != "probe" and abs(sample.ratio - ratio) < 0.06]
    near.sort(key=lambda sample: sample.kl - 2.0 * (sample.ratio - ratio))
    return [np.array(sample.kept) / lab.layout.units for sample in near[:3]]


def refit(lab: Lab, kind: str) -> Predictor:
    """A predictor fitted to all that was measured so far, the held-out masks excepted."""
    return _fit(lab, kind, _fitted(lab))


def _fitted(lab: Lab) -> list[Sample]:
    """In an order that does not depend on which worker was faster, so that a seed gives one result."""
    return sorted(lab.store.all("probe", "spread", "search", "refine"), key=lambda sample: (sample.round, sample.digest))


def _fit(lab: Lab, kind: str, samples: Sequence[Sample]) -> Predictor:
    dense = lab.study.record["dense"]["search"]["log_ppl"]
    return fit_predictor(kind, samples, lab.store.failed(), lab.layout, dense, lab.config.seed)


def _ranks_best(lab: Lab) -> dict[str, float]:
    """Per kind Kendall's tau among masks of nearly one size that it had not seen, by two-fold cross-validation."""
    samples = _fitted(lab)
    rest = [sample for sample in samples if sample.purpose != "probe"]
    fold = _rng(lab, 3).permutation(len(rest)) % 2
    kept, ratios = kept_matrix(rest, lab.layout), np.array([sample.ratio for sample in rest])
    found = {}
    for kind in FITS:
        predicted_kl = np.zeros(len(rest))
        for part in (0, 1):
            seen = [sample for sample, where in zip(rest, fold, strict=True) if where != part]
            predictor = _fit(lab, kind, [*(sample for sample in samples if sample.purpose == "probe"), *seen])
            predicted_kl[fold == part] = predictor.predict(kept[fold == part]).damage
        found[kind] = tau_near(predicted_kl, np.array([sample.kl for sample in rest]), ratios)
    return found


def _predictors(lab: Lab) -> tuple[dict[str, Predictor], dict[str, Any]]:
    """All kinds fitted to all that may be fitted, and their figures on the held-out masks."""
    heldout, samples, failed = lab.store.all("heldout"), lab.store.all(), lab.store.failed()
    dense = lab.study.record["dense"]
    with lab.progress.stage("predictor"):
        predictors = {kind: refit(lab, kind) for kind in FITS}
        judged = {
            kind: figures(predictor, heldout, lab.layout, dense["search"]["log_ppl"]) for kind, predictor in predictors.items()
        }
        ranks = _ranks_best(lab)
    chosen = lab.config.predictor
    report = {
        "predictor": max(ranks, key=lambda kind: ranks[kind]) if chosen == "auto" else chosen,
        "cross_validated_tau": ranks,
        "heldout": {kind: {**asdict(found), "tau_mean": found.tau_mean} for kind, found in judged.items()},
        "samples": {purpose: sum(s.purpose == purpose for s in samples) for purpose in sorted({s.purpose for s in samples})},
        "failed": len(failed),
        "damaged": lab.store.damaged,
        "tokens": {
            "measured": sum(sample.tokens for sample in [*samples, *failed]),
            "calibration": int(lab.text.calibration.size),
            "dense": int(lab.text.search.size + lab.text.test.size) + lab.reference_tokens,
        },
        "measuring_seconds": round(sum(sample.seconds for sample in samples), 2),
        "dense": dense,
    }
    return predictors, report


def _agent(lab: Lab, predictor: Predictor) -> None:
    agent_config = AgentConfig()
    with lab.progress.stage("agent", agent_config.iterations) as advance:
        agent = train_agent(
            _prior(lab), predicted(predictor), lab.layout, LOW_RATIO, _most(lab), lab.config.seed, agent_config,
            lambda reward: advance(f"{100 * (1 - np.exp(-reward)):.1f} % below the additive policy"),
        )  # fmt: skip
    agent.save(lab.study.path("agent"), lab.layout)
