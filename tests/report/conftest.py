import json
from dataclasses import asdict

import numpy as np
import pytest

from builders import copied
from learn_builders import DENSE_LOG_PPL, LAYOUT, RATIOS, curves_of, fitted_study, probes, spread, truth
from ppf.artifact import save_artifact
from ppf.learn.agent import Agent
from ppf.learn.baselines import knapsack
from ppf.learn.fit_predictor import fit_predictor
from ppf.learn.metrics import figures
from ppf.samples import Sample
from ppf.study import read_sealed, write_sealed

MAX_RATIO = 0.6


def cell(method: str, ratio: float, above: float) -> dict:
    """What a bench keeps of one method at one ratio."""
    rise = np.random.default_rng(3).normal(above, 0.01, 8)
    figure = {"method": method, "ratio": ratio, "seed": 0, "kept": [], "tokens": 100, "shared_tokens": 900, "seconds": 1.0}
    return {**figure, "above": rise.tolist(), "kl": rise.tolist()}


def report_of(predictors: dict, samples: list[Sample], heldout: list[Sample]) -> dict:
    """The report that a fit writes."""
    judged = {kind: figures(made, heldout, LAYOUT, DENSE_LOG_PPL) for kind, made in predictors.items()}
    return {
        "predictor": "corrected",
        "importance": {"method": "random", "by_site": []},
        "heldout": {kind: {**asdict(found), "tau_mean": found.tau_mean} for kind, found in judged.items()},
        "samples": {"probe": 40, "spread": len(samples) - 40, "heldout": len(heldout)},
        "failed": 0,
        "tokens": {"measured": 123_456, "calibration": 1000},
        "measuring_seconds": 12.5,
        "seconds": {"text": 1.0, "search 1": 2.0, "search 2": 3.0, "measuring round 1": 4.0},
        "made": {"version": "0.1.0", "commit": "abc", "machine": {"python": "3.11", "torch": "2.11", "cpu": "some cpu"}},
    }


@pytest.fixture(scope="session")
def study(tmp_path_factory):
    """A fitted study of a made-up model with all that a report reads, a bench among it."""
    of = truth()
    samples, heldout = probes(of) + spread(of, 12), spread(of, 8, seed=9, purpose="heldout")
    predictors = {kind: fit_predictor(kind, samples, [], LAYOUT, DENSE_LOG_PPL, 0) for kind in ("corrected", "additive")}
    agent = Agent(knapsack(curves_of(of), LAYOUT), np.array(MAX_RATIO))
    made = fitted_study(tmp_path_factory.mktemp("report") / "study", predictors["corrected"], agent)
    store = made.store(write=True)
    for sample in samples + heldout:
        store.add(sample)
    store.close()
    (made.folder / "report.json").write_text(json.dumps(report_of(predictors, samples, heldout)))
    save_artifact(made.path("text"), "text", LAYOUT.fingerprint, {"search": np.zeros((2, 16))}, name="text")
    cells = [cell(method, ratio, above) for ratio in RATIOS for method, above in (("uniform", 0.5), ("additive", 0.2))]
    (made.folder / "bench.json").write_text(json.dumps({f"{one['method']} {one['ratio']!r} ": one for one in cells}))
    record = read_sealed(made.folder / "study.json")
    record["settings"] = {"model": "made up", "study": "runs/x", "text": "pydocs", "seed": 0, "samples": 590, "rounds": 3}
    record["dense"]["test"] |= {"interval": [2.4, 2.6], "tokens": 64}
    write_sealed(made.folder / "study.json", record)
    return made


@pytest.fixture
def changed(study, tmp_path):
    """A copy of it, to change."""
    return copied(study, tmp_path / "study")
