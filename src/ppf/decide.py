"""Run time: from a wanted size to a decision, in milliseconds. No language model is touched, torch is not imported."""

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ppf.config import Target
from ppf.errors import InputError
from ppf.learn.agent import Agent
from ppf.learn.nested import Chain
from ppf.learn.objective import predicted
from ppf.learn.predictor import Prediction, Predictor
from ppf.space.allocation import Allocation, allocate, allocate_many
from ppf.space.budget import Budget, parse_count, parse_size
from ppf.space.layout import Layout
from ppf.space.mask import Mask, select
from ppf.space.policy import Policy
from ppf.study import StudyFolder, read_whole

_HEADER = 2048
"""Bytes a layer that a safetensors header takes at most: a file of a wanted size must hold it too."""
_NEARBY, _NEIGHBOURS = 0.05, 26
"""How far from a ratio on a grid other policies of the agent are asked, and how many."""


@dataclass(frozen=True, eq=False)
class Decision:
    """What stays, and what that should cost.

    Attributes:
        asked: The ratio that was asked for, or that the asked size comes to.
        met: The share of the prunable parameters that goes; ``asked`` or a little more, see ``allocate`` and ``Chain.kept``.
        policy: What was wished.
        allocation: Units kept per site.
        mask: Which ones.
        prediction: Of this one mask; arrays of length 1. Its standard deviations are as much wider than the predictor's own as
            held-out masks showed them to be too narrow.
        log_ppl: Predicted log-perplexity on the study's test text, nats/token.
        params: Parameters of the model before and after.
        in_range: Whether the ratio is at most the largest that the agent was trained on.
        milliseconds: Time that deciding took.
    """

    asked: float
    met: float
    policy: Policy
    allocation: Allocation
    mask: Mask
    prediction: Prediction
    log_ppl: float
    params: tuple[int, int]
    in_range: bool
    milliseconds: float

    def to_json(self, layout: Layout) -> dict[str, Any]:
        """A JSON-ready record."""
        expected = {"log_ppl": self.log_ppl, "std": float(self.prediction.log_ppl_std[0]), "ppl": float(np.exp(self.log_ppl))}
        return {
            "ratio": {"asked": self.asked, "met": self.met},
            "kept": params_and_kept(layout, self.allocation.kept)[1],
            "predicted": expected,
            "params": {"before": self.params[0], "after": self.params[1]},
            "in_range": self.in_range,
            "milliseconds": self.milliseconds,
        }


def params_and_kept(layout: Layout, kept: np.ndarray) -> tuple[int, list[dict[str, Any]]]:
    """Parameters of the whole model, and a JSON-ready record a site, when ``kept`` (Int[S]) units stay."""
    sites = zip(layout.sites, kept, strict=True)
    record = [{"layer": site.layer, "kind": site.kind, "kept": int(count), "of": site.units} for site, count in sites]
    return int(layout.kept_params(kept)), record


def missed_by(report: dict[str, Any]) -> float:
    """``Decider.missed_by`` of a fit's report."""
    heldout = report.get("heldout", {}).get(report.get("predictor"), {})
    return float(heldout.get("z", 1.0))


class Decider:
    """A fitted study, ready to decide: all of one fit, and in memory, whatever becomes of the folder.

    Args:
        folder: The study folder.

    Attributes:
        study: The folder and its record.
        layout: The removable places of the dense model.
        importance: The order of the units.
        predictor: What it learnt of damage.
        agent: The policies.
        chain: The nested policies.
        report: What the fit said of itself at its end.
        mark: Of the fit; see ``mark_of``.

    Raises:
        InputError: No study, or one that is not fitted yet.
        DamagedError: An artefact is not whole or of another model, or the study is replaced faster than it can be read.
    """

    def __init__(self, folder: str | Path) -> None:
        _, self.mark = read_whole(Path(folder), lambda: self._read(folder))

    def _read(self, folder: str | Path) -> None:
        self.study = StudyFolder(folder)
        self.study.check_fitted()
        self.layout, self.importance = self.study.layout, self.study.importance
        self.predictor = Predictor.load(self.study.path("predictor"), self.layout)
        self.agent = Agent.load(self.study.path("agent"), self.layout)
        self.chain = Chain.load(self.study.path("nested"), self.layout)
        self.report = self.study.report

    @cached_property
    def dense_log_ppl(self) -> float:
        """Of the dense model on the test text, nats/token."""
        return float(self.study.record["dense"]["test"]["log_ppl"])

    @cached_property
    def missed_by(self) -> float:
        """How many of its standard deviations the predictor was off on held-out masks, root mean square; 1 if nobody says."""
        return missed_by(self.report)

    def budget(self, target: Target) -> Budget:
        """What must go for a wanted ratio, number of parameters, or size.

        Raises:
            InputError: More than the floors allow.
        """
        if target.ratio is not None:
            return Budget.from_ratio(target.ratio, self.layout, *target.grid)
        if target.params is not None:
            return Budget.from_params(parse_count(target.params), self.layout, *target.grid)
        assert target.memory is not None  # a target is given in exactly one wording
        per_param, headers = self.study.record["model"]["bytes_per_param"], _HEADER * (self.layout.layers + 2)
        return Budget.from_memory(parse_size(target.memory), self.layout, per_param, *target.grid, headers)

    def decide(self, target: Target, policy: Policy | None = None) -> Decision:
        """Decides.

        Args:
            target: How small.
            policy: Instead of the agent's, such as the uniform one; not with a nested target.

        Raises:
            InputError: More than the floors allow, or a policy and a nested target.
        """
        if target.nested and policy is not None:
            raise InputError("a nested decision must take its own policy; another came; leave one out")
        start = time.perf_counter()
        budget = self.budget(target)
        if target.nested:
            kept = self.chain.kept(np.array([budget.remove]), *target.grid)[0]
            return self._decision(target, budget, Policy(kept / self.layout.units), Allocation(kept), start)
        if policy is None:
            policy = self._proposal(target, budget)
        return self._decision(target, budget, policy, allocate(policy, budget, self.layout, *target.grid), start)

    def _proposal(self, target: Target, budget: Budget) -> Policy:
        """The agent's policy; on a grid, which the agent was not trained on, the best of some, by the predictor.

        Rounding to whole steps can move a whole KV group, so that a policy for a ratio nearby, or the nested one, comes out
        better than the agent's own.
        """
        ratio = self._asked(target, budget)
        if target.grid == (1, 1):
            return self.agent.propose(ratio)
        nearby = np.concatenate([[0.0], np.linspace(-_NEARBY, _NEARBY, _NEIGHBOURS)])
        wishes = [self.agent.keep[self.agent.rows(np.clip(ratio + nearby, 0.0, 1.0))]]
        wishes += [self.chain.kept(np.array([budget.remove]), *grid) / self.layout.units for grid in ((1, 1), target.grid)]
        keep = np.concatenate(wishes)
        kept = allocate_many(keep, np.full(len(keep), budget.remove), self.layout, *target.grid)
        return Policy(keep[int(predicted(self.predictor)(kept).argmin())])

    def rounding(self, target: Target) -> dict[str, Any] | None:
        """What rounding to the grid costs before any refinement, if there is a grid: predicted perplexity with it and without."""
        align, tp = target.grid
        if target.grid == (1, 1):
            return None
        rounded, free = (self.decide(one) for one in (target, replace(target, align=1, tp=1)))
        return {"align": align, "tp": tp, "ppl": float(np.exp(rounded.log_ppl)), "unrounded_ppl": float(np.exp(free.log_ppl))}

    def adopt(self, target: Target, kept: np.ndarray) -> Decision:
        """The decision for an allocation that was found otherwise; Int[S] kept units that meet the target."""
        policy = Policy(kept / self.layout.units)
        return self._decision(target, self.budget(target), policy, Allocation(kept), time.perf_counter())

    def predict(self, kept: np.ndarray) -> Prediction:
        """What the predictor says of Int[N, S] kept units, its errors widened as held-out masks showed they must be."""
        prediction, by = self.predictor.predict(kept), max(1.0, self.missed_by)
        return replace(prediction, std=by * prediction.std, log_ppl_std=by * prediction.log_ppl_std)

    def _asked(self, target: Target, budget: Budget) -> float:
        return budget.ratio(self.layout) if target.ratio is None else float(target.ratio)

    def _decision(self, target: Target, budget: Budget, policy: Policy, allocation: Allocation, start: float) -> Decision:
        asked = self._asked(target, budget)
        mask = select(allocation, self.importance, self.layout)
        prediction = self.predict(allocation.kept[None])
        after = int(self.layout.kept_params(allocation.kept))
        return Decision(
            asked,
            float(self.layout.ratio(allocation.kept)),
            policy,
            allocation,
            mask,
            prediction,
            self.dense_log_ppl + float(prediction.log_ppl[0]),
            (self.layout.total, after),
            bool(asked <= float(self.agent.max_ratio) + 1e-9),
            (time.perf_counter() - start) * 1e3,
        )
