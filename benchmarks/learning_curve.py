"""How many masks does a predictor need, and is what we learn better than what any library learns from the same masks?

Studies of one model that differ in --samples alone; all are judged on the held-out masks of the largest, which lie around
its agent's policies. Controls see the keep-ratio of every site and learn log(damage + e), as ours does.

    python benchmarks/learning_curve.py --name stories260K --studies runs/n50 runs/n100 ... runs/n2000
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from ppf.artifact import read_json
from ppf.learn.fit_predictor import FITS, fit_predictor
from ppf.learn.metrics import tau
from ppf.learn.predictor import read_link
from ppf.learn.process import NOISE
from ppf.samples import Sample, kept_matrix
from ppf.study import StudyFolder
from record import write

Control = Callable[[int, int], Any]
"""Sites and seed -> a regressor of scikit-learn."""


def _process(sites: int, seed: int) -> Any:
    kernel = ConstantKernel(1.0) * RBF(np.ones(sites)) + WhiteKernel(1e-2)
    return GaussianProcessRegressor(kernel, normalize_y=True, random_state=seed)


CONTROLS: dict[str, tuple[Control, bool]] = {
    "ratio alone": (lambda sites, seed: HistGradientBoostingRegressor(random_state=seed, min_samples_leaf=5), True),
    "ridge": (lambda sites, seed: make_pipeline(StandardScaler(), RidgeCV(np.logspace(-3, 3, 13))), False),
    "ridge on pairs": (
        lambda sites, seed: make_pipeline(PolynomialFeatures(2), StandardScaler(), RidgeCV(np.logspace(-1, 5, 13))),
        False,
    ),
    "gradient-boosted trees": (
        lambda sites, seed: HistGradientBoostingRegressor(learning_rate=0.05, max_iter=500, min_samples_leaf=5, random_state=seed),
        False,
    ),
    "Gaussian process on keep-ratios": (_process, False),
}
"""By name; and whether it sees the share of all that stays, and nothing else."""


def judged(damage: np.ndarray, log_ppl: np.ndarray, heldout: Sequence[Sample], dense: float) -> dict[str, Any]:
    """Errors and order of predictions, Float[N] each."""
    truth, ratios = np.array([sample.kl for sample in heldout]), np.array([sample.ratio for sample in heldout])
    rise = np.array([sample.log_ppl for sample in heldout]) - dense
    return {
        "mse": float(((np.exp(-log_ppl) - np.exp(-rise)) ** 2).mean()),
        "tau": round(tau(damage, truth), 3),
        "tau_within": {f"{ratio:g}": round(tau(damage[ratios == ratio], truth[ratios == ratio]), 3) for ratio in np.unique(ratios)},
    }


def learnt(study: StudyFolder, heldout: Sequence[Sample]) -> dict[str, Any]:
    """What every kind of predictor learns from one study's masks."""
    layout, seed = study.layout, study.record["settings"]["seed"]
    dense = study.record["dense"]["search"]["log_ppl"]
    samples = study.store().all("probe", "spread", "search")
    samples = sorted(samples, key=lambda sample: (sample.round, sample.digest))
    kept, found = kept_matrix(list(heldout), layout), {}
    for kind in FITS:
        start = time.perf_counter()
        predictor = fit_predictor(kind, samples, [], layout, dense, seed)
        answer = predictor.predict(kept)
        found[kind] = judged(answer.damage, answer.log_ppl, heldout, dense) | {"seconds": round(time.perf_counter() - start, 2)}
    seen, target = kept_matrix(samples, layout), np.log(np.array([max(sample.kl, 0.0) for sample in samples]) + NOISE)
    for name, (make, ratio_alone) in CONTROLS.items():
        features = [rows @ layout.costs[:, None] / layout.prunable if ratio_alone else rows / layout.units for rows in (seen, kept)]
        start = time.perf_counter()
        damage = np.maximum(np.exp(make(len(layout.sites), seed).fit(features[0], target).predict(features[1])) - NOISE, 0.0)
        seconds = round(time.perf_counter() - start, 2)
        found[name] = judged(damage, read_link(predictor.link, damage), heldout, dense) | {"seconds": seconds}
    return {"fitted": len(samples), "predictors": found}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--studies", nargs="+", required=True)
    arguments = parser.parse_args()
    studies = sorted((StudyFolder(folder) for folder in arguments.studies), key=lambda study: study.record["settings"]["samples"])
    largest = studies[-1]
    if len({study.context for study in studies}) > 1:
        parser.error("--studies must share model and text; they do not; fit them with the same settings but --samples")
    heldout = largest.store().all("heldout")
    ratios = sorted({sample.ratio for sample in heldout})
    curve = []
    for study in studies:
        curve.append(learnt(study, heldout))
        ours = curve[-1]["predictors"]["corrected"]
        print(f"{curve[-1]['fitted']} masks: {ours['tau_within']}", flush=True)
    seed = read_json(largest.folder / "report.json")["settings"]["seed"]
    write(f"learning-{arguments.name}", seed, {"heldout": len(heldout), "ratios": ratios, "curve": curve})


if __name__ == "__main__":
    main()
