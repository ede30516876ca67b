"""fit: importance -> samples -> predictor -> agent, into a study folder that can be stopped and started at any point.

probes        each site alone at a few levels: the damage curves
spread        random policies of every ratio around the additive optimum
round 1..R    the agent trains on the predictor; what it would do is measured, and masks near it; all is fitted again
heldout       masks of one size around the agent's policies at 20, 30, 40 and 50 %: predicted, never fitted
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ppf.artifact import remove_unfinished
from ppf.config import FitConfig
from ppf.errors import InputError
from ppf.learn.agent import Agent
from ppf.learn.baselines import knapsack
from ppf.learn.fit_predictor import FITS, fit_curves, fit_predictor
from ppf.learn.metrics import figures, tau_near
from ppf.learn.objective import predicted
from ppf.learn.predictor import Predictor
from ppf.learn.train_agent import AgentConfig, train_agent
from ppf.learn.train_nested import NEST_STEPS, nest
from ppf.llm.collect import Wanted, probes, spread, stratified_ratios
from ppf.llm.load import LoadedModel
from ppf.lock import locked
from ppf.progress import Advance, Progress
from ppf.provenance import provenance
from ppf.recipes.choices import choose_placement
from ppf.recipes.lab import Lab, check_engine, layout_for, load_for
from ppf.recipes.places import check_study_place, leave_no_beginning
from ppf.repair import set_aside_damaged
from ppf.samples import Sample, kept_matrix
from ppf.space.allocation import allocate
from ppf.space.budget import Budget, largest_ratio
from ppf.space.layout import Layout
from ppf.space.policy import Policy
from ppf.study import StudyFolder

HELDOUT_RATIOS = (0.2, 0.3, 0.4, 0.5)
LOW_RATIO = 0.02
_HELDOUT_SHARE, _HELDOUT_MOST = 0.16, 24
_SPREAD_SHARE = 0.2
_SCALES = (0.03, 0.06, 0.12, 0.2)
_LEVELS = {1: (0.0,), 2: (0.5, 0.0), 3: (0.75, 0.4, 0.0), 4: (0.8, 0.5, 0.25, 0.0), 5: (0.9, 0.75, 0.5, 0.25, 0.0)}


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
        ResourceError: Ray is asked for and not installed.
    """
    folder = Path(config.study)
    check_study_place(folder)
    check_engine(config, loaded)
    progress.plan(_stages(config))
    made = not folder.exists()
    with locked(folder) as dead:
        if dead:
            progress.say(f"{dead} did not give this study back; if it still runs, end it; this fit goes on")
        remove_unfinished(folder)
        try:
            loaded = loaded or load_for(config.model, progress)
            levels = _levels(layout_for(config, loaded), config.samples)
            if (folder / "study.json").exists():
                for one in set_aside_damaged(StudyFolder(folder)):
                    progress.say(f"{one}; it is made again")
            choose_placement(config.device)
            with Lab(loaded, config, progress) as lab:
                return _fit_all(lab, levels)
        finally:
            leave_no_beginning(folder, made)


def _fit_all(lab: Lab, levels: tuple[float, ...]) -> StudyFolder:
    study, config = lab.open_study(), lab.config
    if study.is_fitted and study.report["settings"]["predictor"] == config.predictor:
        lab.progress.say(f"{study.folder} is fitted already")
        return study
    lab.score()
    _collect(lab, levels)
    with lab.progress.stage("predictor", 2 * len(FITS)) as advance:
        predictors = {}
        for kind in FITS:
            predictors[kind] = refit(lab, kind)
            advance(kind)
        ranks = _ranks(lab, advance)
    chosen = max(ranks, key=lambda kind: ranks[kind]) if config.predictor == "auto" else config.predictor
    agent = trained(lab, predictors[chosen], "agent")
    with lab.progress.stage("nested agent", NEST_STEPS) as advance:
        objective, seed = predicted(predictors[chosen]), config.seed
        chain = nest(agent, objective, lab.layout, LOW_RATIO, _most(lab), seed, advance=lambda gain: advance(""))
    lab.measure("heldout", lambda: _heldout(lab, agent), 0)
    report = {"predictor": chosen, "cross_validated_tau": ranks, **_report(lab, predictors)}
    report |= {"seconds": lab.keep_seconds(), "settings": asdict(config), "made": provenance()}
    study.drop_report()  # what an earlier fit left has answered so far; from here until the new report nothing does
    predictors[chosen].save(study.path("predictor"), lab.layout)
    agent.save(study.path("agent"), lab.layout)
    chain.save(study.path("nested"))
    study.keep_report(report)
    return study


def _stages(config: FitConfig) -> list[str]:
    """What a fit goes through; what is at hand, or need not be done, is left out on the way."""
    rounds = [name for r in range(1, config.rounds + 1) for name in (f"search {r}", f"measuring round {r}")]
    importance = ["importance", *(["choosing importance"] if config.score == "auto" else [])]
    first = ["loading", "text", "dense model", *importance, "measuring probes", "measuring spread"]
    return [*first, *rounds, "predictor", "agent", "nested agent", "measuring heldout"]


def _levels(layout: Layout, samples: int) -> tuple[float, ...]:
    """Probe levels that take at most half of the samples."""
    for count in sorted(_LEVELS, reverse=True):
        if len(probes(layout, _LEVELS[count])) <= samples // 2:
            return _LEVELS[count]
    needed = 2 * len(probes(layout, _LEVELS[1]))
    sites = len(layout.sites)
    raise InputError(f"--samples must be at least {needed} for the {sites} sites of this model; {samples} came; raise it")


def _collect(lab: Lab, levels: tuple[float, ...]) -> None:
    """Measures everything that the predictor is fitted to."""
    config, layout = lab.config, lab.layout
    count = len(lab.measure("probes", lambda: probes(layout, levels), 0))
    rest = max(config.samples - count - len(_heldout_ratios(lab)), 8)
    first = rest if config.rounds == 0 else max(8, int(rest * _SPREAD_SHARE))
    lab.measure("spread", lambda: _spread(lab, first), 0)
    for round in range(1, config.rounds + 1):
        share = (rest - first) * round // config.rounds - (rest - first) * (round - 1) // config.rounds
        if share > 0:
            lab.measure(f"round {round}", partial(_found, lab, round, share), round)


def _rng(lab: Lab, stage: int) -> np.random.Generator:
    return np.random.default_rng([lab.config.seed, stage])


def additive_agent(lab: Lab) -> Agent:
    """The additive optimum for every ratio: where training starts, and what it must beat."""
    curves = fit_curves(lab.store.all("probe"), lab.store.failed(), lab.layout)
    return Agent(knapsack(curves, lab.layout), np.array(_most(lab)))


def _centres(lab: Lab, ratios: Sequence[float], rng: np.random.Generator) -> list[tuple[float, Policy]]:
    """Policies between the additive optimum and the uniform one."""
    additive = additive_agent(lab)
    rows, blend = additive.keep[additive.rows(np.array(ratios))], rng.beta(1.0, 2.0, len(ratios))
    return [(ratio, Policy((1 - b) * row + b * (1 - ratio))) for ratio, row, b in zip(ratios, rows, blend, strict=True)]


def _heldout_ratios(lab: Lab) -> list[float]:
    """The nominal ratio of each held-out mask."""
    most = _most(lab)
    ratios = [ratio for ratio in HELDOUT_RATIOS if ratio <= most] or [round(most / 2, 3), round(most * 0.99, 3)]
    each = min(_HELDOUT_MOST, max(2, int(lab.config.samples * _HELDOUT_SHARE) // len(ratios)))
    return np.repeat(ratios, each).tolist()


def _heldout(lab: Lab, agent: Agent) -> list[Wanted]:
    centres = [(ratio, agent.propose(ratio)) for ratio in _heldout_ratios(lab)]
    return spread(lab.layout, centres, _SCALES, "heldout", _rng(lab, 1))


def _spread(lab: Lab, count: int) -> list[Wanted]:
    rng = _rng(lab, 2)
    ratios = stratified_ratios(LOW_RATIO, _most(lab), count, rng).tolist()
    return spread(lab.layout, _centres(lab, ratios, rng), _SCALES, "spread", rng)


def _most(lab: Lab) -> float:
    """The largest ratio that is asked for and that the floors allow."""
    return min(lab.config.max_ratio, largest_ratio(lab.layout))


def _found(lab: Lab, round: int, count: int) -> list[Wanted]:
    """What the agent would do at many ratios, as far as is known now, and two masks near each."""
    rng, layout = _rng(lab, 10 + round), lab.layout
    kind = "corrected" if lab.config.predictor == "auto" else lab.config.predictor
    agent = trained(lab, _fit(lab, kind, _fitted(lab, round)), f"search {round}")
    wanted = list[Wanted]()
    for ratio in stratified_ratios(min(0.1, _most(lab) / 2), _most(lab), -(-count // 3), rng).tolist():
        centre = agent.propose(ratio)
        ours = Wanted(allocate(centre, Budget.from_ratio(ratio, layout), layout), "search", ratio)
        wanted += [ours, *spread(layout, [(ratio, centre)] * 2, rng.permutation(_SCALES[:3]).tolist(), "search", rng)]
    return wanted[:count]


def trained(lab: Lab, predictor: Predictor, stage: str) -> Agent:
    """The agent that a predictor teaches."""
    config = AgentConfig()
    with lab.progress.stage(stage, config.steps) as advance:
        return train_agent(
            additive_agent(lab), predicted(predictor), lab.layout, LOW_RATIO, _most(lab), lab.config.seed, config,
            lambda gain: advance(f"{100 * (1 - np.exp(-gain)):.1f} % below the additive policy"),
        )  # fmt: skip


def incumbents(lab: Lab, ratio: float) -> list[np.ndarray]:
    """Keep-ratios of the best measured masks near a ratio: least damage, with credit for having removed more."""
    near = [sample for sample in _fitted(lab) if sample.purpose != "probe" and abs(sample.ratio - ratio) < 0.06]
    near.sort(key=lambda sample: sample.kl - 2.0 * (sample.ratio - ratio))
    return [np.array(sample.kept) / lab.layout.units for sample in near[:3]]


def refit(lab: Lab, kind: str) -> Predictor:
    """A predictor fitted to all that was measured so far, the held-out masks excepted."""
    return _fit(lab, kind, _fitted(lab))


def _fitted(lab: Lab, before: float = math.inf) -> list[Sample]:
    """In an order that does not depend on which worker was faster, so that a seed gives one result.

    ``before`` a round, so that a plan that is lost is made again as it was.
    """
    samples = [sample for sample in lab.store.all("probe", "spread", "search", "refine") if sample.round < before]
    return sorted(samples, key=lambda sample: (sample.round, sample.digest))


def _fit(lab: Lab, kind: str, samples: Sequence[Sample]) -> Predictor:
    dense = lab.study.record["dense"]["search"]["log_ppl"]
    return fit_predictor(kind, samples, lab.store.failed(), lab.layout, dense, lab.config.seed)


def _ranks(lab: Lab, advance: Advance) -> dict[str, float]:
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
        best = max(found, key=lambda kind: found[kind])
        advance(f"best order: {best}, tau {found[best]:.3f}")
    return found


def _report(lab: Lab, predictors: dict[str, Predictor]) -> dict[str, Any]:
    """The predictors' figures on the held-out masks, and what was spent."""
    samples, failed, dense = lab.store.all(), lab.store.failed(), lab.study.record["dense"]
    chosen = lab.study.plan("importance") or {"by_site": [], "masks": 0}
    heldout = [sample for sample in samples if sample.purpose == "heldout"]
    judged = {kind: figures(made, heldout, lab.layout, dense["search"]["log_ppl"]) for kind, made in predictors.items()}
    return {
        "importance": {"method": lab.study.importance.method, "by_site": chosen["by_site"]},
        "heldout": {kind: {**asdict(found), "tau_mean": found.tau_mean} for kind, found in judged.items()},
        "samples": {purpose: sum(s.purpose == purpose for s in samples) for purpose in sorted({s.purpose for s in samples})},
        "failed": len(failed),
        "damaged": lab.store.damaged,
        "tokens": {
            "measured": sum(sample.tokens for sample in [*samples, *failed]),
            "calibration": int(lab.text.calibration.size) * max(1, chosen["masks"] // len(lab.layout.sites)),
            "importance": chosen["masks"] * int(lab.text.search.size),
            "dense": int(lab.text.search.size + lab.text.test.size) + lab.reference_tokens,
        },
        "measuring_seconds": round(sum(sample.seconds for sample in samples), 2),
        "dense": dense,
    }
