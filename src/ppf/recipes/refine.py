"""refine: static pruning. A search on the predictor at one ratio, and true measurements of what it found."""

import numpy as np

from ppf.config import Target
from ppf.decide import Decider, Decision
from ppf.errors import InputError, ResourceError
from ppf.learn.objective import predicted
from ppf.learn.search import refine as search
from ppf.llm.collect import Wanted
from ppf.llm.load import LoadedModel
from ppf.lock import locked
from ppf.progress import Progress
from ppf.recipes.fit import incumbents, refit
from ppf.recipes.lab import Lab, settings_of
from ppf.samples import kept_matrix
from ppf.space.allocation import Allocation
from ppf.space.budget import Budget, unit_steps
from ppf.space.mask import select

_REFINE_STEPS = 60
FINALISTS = 8
"""How many candidates of static pruning are measured on the validation text."""


def check_refinable(target: Target, refine: bool) -> None:
    """Refuses to refine a nested policy: the result would be nested in no other.

    Raises:
        InputError: Both are wanted.
    """
    if refine and target.nested:
        raise InputError("nested policies must be taken as they come; a refinement came too; leave one out")


def searched(
    decider: Decider, decision: Decision, loaded: LoadedModel, target: Target, device: str, candidates: int, progress: Progress
) -> Decision:
    """``refined``, in the study of a decision.

    Args:
        decider: Of the study.
        decision: What is to be refined.
        loaded: The dense model.
        target: How small.
        device: Where to measure.
        candidates: How many policies to measure.
        progress: Shows what happens.
    """
    config = settings_of(decider.study, study=str(decider.study.folder), device=device)
    with locked(decider.study.folder), Lab(loaded, config, progress) as lab:
        lab.open_study()
        return refined(decider, decision, lab, target, candidates)


def refined(decider: Decider, decision: Decision, lab: Lab, target: Target, candidates: int) -> Decision:
    """Static pruning: search on the predictor at one ratio, measure the best, learn, search again; the best measured wins.

    Every measurement on the search text goes into the study's store and counts in later choices. The best few are measured on
    the validation text, too, which is longer and which no search has seen, and both decide.
    """
    budget, rng = decider.budget(target), np.random.default_rng(lab.config.seed)
    predictor = decider.predictor
    first = max(1, candidates // 2)
    for number, count in enumerate([first, candidates - first]):
        starts = np.stack([decision.policy.keep, *incumbents(lab, decision.asked)])
        with lab.progress.stage("search"):
            found, _ = search(predicted(predictor), starts, budget.remove, lab.layout, _REFINE_STEPS, rng, *target.grid)
        ours = [decision.allocation.kept] if number == 0 else []
        chosen = [*ours, *_apart(found, lab.layout.units, count)][:count]
        lab.run("candidates", [Wanted(Allocation(kept), "refine", decision.asked) for kept in chosen], 100 + number)
        if number == 0 and candidates > first:
            with lab.progress.stage("predictor"):
                predictor = refit(lab, decider.predictor.kind)
    return decider.adopt(target, _winner(lab, *_best_measured(lab, budget, target.grid, decision.allocation)))


def _winner(lab: Lab, kept: np.ndarray, damage: np.ndarray) -> np.ndarray:
    """Int[S]: of a few allocations, Int[N, S], and their damages on the search text the best on search and validation text."""
    if not len(lab.text.validation) or len(kept) == 1:
        return kept[int(damage.argmin())]
    masks = [select(Allocation(row), lab.study.importance, lab.layout) for row in kept]
    with lab.progress.stage("validating", len(masks)) as advance:
        answers = lab.answers(masks, "validation", advance=advance)
    fresh = np.array([answer.kl if np.isfinite(answer.kl) else np.inf for answer in answers])
    total = damage * lab.text.search.size + fresh * lab.text.validation.size
    return kept[int(total.argmin())]


def _best_measured(lab: Lab, budget: Budget, grid: tuple[int, int], ours: Allocation) -> tuple[np.ndarray, np.ndarray]:
    """Of all masks ever measured in this study that meet a budget as ``allocate`` does, those with the least damage.

    ``ours`` is one such: where one unit of a site costs more than all that the others can give, ``allocate`` spends less
    than the budget by more than a step.

    Returns:
        Int[N, S], ``ours`` first if it was measured, then the best, at most ``FINALISTS``; and Float[N] their damages.

    Raises:
        ResourceError: None could be measured.
    """
    layout, samples = lab.layout, lab.store.all()
    kept = kept_matrix(samples, layout)
    steps, target = unit_steps(layout, *grid), layout.prunable - budget.remove
    spent = kept @ layout.costs
    close = (spent <= target) & (spent >= min(ours.kept @ layout.costs, target - (steps * layout.costs).min() + 1))
    fits = close & ((kept % steps == 0) | (kept == layout.units)).all(axis=1)
    if not fits.any():
        reasons = [sample.reason for sample in lab.store.failed()] or ["nothing was measured"]
        raise ResourceError(f"a candidate must be measurable; none was: {reasons[-1]}; try --dtype or another --device")
    damage = np.array([sample.kl for sample in samples])
    is_ours = (kept[fits] == ours.kept).all(axis=1)
    best = np.argsort(damage[fits], kind="stable")
    order = np.concatenate([best[is_ours[best]], best[~is_ours[best]]])[:FINALISTS]  # what needed no luck is always among them
    return kept[fits][order], damage[fits][order]


def _apart(found: np.ndarray, units: np.ndarray, count: int) -> list[np.ndarray]:
    """The best ones that differ from each other by more than a hair: two channels in a thousand somewhere."""
    chosen: list[np.ndarray] = []
    for kept in found:
        if all(np.abs((kept - other) / units).max() > 2e-3 for other in chosen):
            chosen.append(kept)
        if len(chosen) == count:
            break
    return chosen
