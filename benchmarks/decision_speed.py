"""How fast are a prediction and a decision, at the layouts of large models? No weights are needed.

Samples are synthetic: damages that add up, times a random interaction. Timing does not depend on their values.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import LlamaConfig

from ppf.config import Target
from ppf.decide import Decider
from ppf.learn.agent import Agent
from ppf.learn.baselines import knapsack
from ppf.learn.fit_predictor import FITS, fit_curves, fit_predictor
from ppf.learn.objective import predicted
from ppf.learn.predictor import Predictor
from ppf.learn.train_agent import AgentConfig, train_agent
from ppf.learn.train_nested import chain_of
from ppf.llm.architectures import layout_of
from ppf.llm.collect import probes, spread, stratified_ratios
from ppf.samples import Measurement, Sample
from ppf.space.importance import Importance
from ppf.space.layout import Layout
from ppf.space.mask import select
from ppf.space.policy import Policy
from ppf.study import StudyFolder
from record import write

MODELS = {
    "Llama-2-7B": LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        vocab_size=32000,
    ),
    "Llama-3-70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
DENSE = 2.0


def synthetic_study(folder: Path, layout: Layout, count: int, seed: int) -> tuple[Decider, dict[str, Predictor]]:
    """A fitted study of a model that does not exist, and all kinds of predictors for it."""
    rng = np.random.default_rng(seed)
    importance = Importance(tuple(rng.random(units).astype(np.float32) for units in layout.units), "random", "none")
    ratios = stratified_ratios(0.05, 0.6, count, rng)
    centres = [(float(ratio), Policy.uniform(layout)) for ratio in ratios]
    wanted = [*probes(layout, (0.5, 0.0)), *spread(layout, centres, (0.05, 0.15), "spread", rng)]
    weight = rng.lognormal(0, 1, len(layout.sites)) / len(layout.sites)
    samples = []
    for item in wanted:
        gone = 1 - item.allocation.kept / layout.units
        damage = float((weight * gone**2).sum() * (1 + gone.mean()))
        mask = select(item.allocation, importance, layout)
        samples.append(Sample.of(mask, "c", item.purpose, item.ratio, 0, Measurement(DENSE + damage, damage, 4096, 1.0)))
    dense = {part: {"log_ppl": DENSE, "interval": [DENSE, DENSE], "tokens": 4096} for part in ("search", "test")}
    record = {
        "model": {"name": "", "digest": "", "bytes_per_param": 2}, "layout": layout.to_json(), "settings": {}, "dense": dense,
        "context": "c", "seq_len": 2048, "dtype": "float32",
    }  # fmt: skip
    study = StudyFolder.create(folder, record)
    importance.save(study.path("importance"), layout)
    predictors = {kind: fit_predictor(kind, samples, [], layout, DENSE, seed) for kind in FITS}
    predictors["corrected"].save(study.path("predictor"), layout)
    curves = fit_curves(samples, [], layout)
    start = Agent(knapsack(curves, layout), np.array(0.6))
    agent = train_agent(start, predicted(predictors["additive"]), layout, 0.02, 0.6, seed, AgentConfig(steps=2))
    agent.save(study.path("agent"), layout)
    chain_of(agent, layout).save(study.path("nested"))
    (folder / "report.json").write_text("{}")
    return Decider(folder), predictors


def milliseconds(action, runs: int) -> dict[str, float]:
    """Median and 99th percentile of a call."""
    times = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        action()
        times.append(1e3 * (time.perf_counter() - start))
    return {"median": round(float(np.median(times[3:])), 4), "p99": round(float(np.quantile(times[3:], 0.99)), 4)}


def measure(name: str, seed: int, samples: int) -> dict:
    layout = layout_of(MODELS[name])
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        decider, predictors = synthetic_study(Path(folder), layout, samples, seed)
        ratios = iter(rng.uniform(0.05, 0.6, 10_000))
        result: dict[str, Any] = {"sites": len(layout.sites), "samples": samples, "predictors": {}}
        kept = np.array([decider.decide(Target(ratio=float(next(ratios)))).allocation.kept for _ in range(32)])
        many = np.tile(kept, (640, 1))
        for kind, predictor in predictors.items():
            seconds = []
            for _ in range(3):
                start = time.perf_counter()
                predictor.predict(many)
                seconds.append(time.perf_counter() - start)
            one = milliseconds(lambda predictor=predictor: predictor.predict(kept[:1]), 300)
            result["predictors"][kind] = {"one_mask_ms": one, "masks_per_second": round(len(many) / float(np.median(seconds)))}
        result["decision_ms"] = milliseconds(lambda: decider.decide(Target(ratio=float(next(ratios)))), 500)
        processes = []
        for _ in range(5):
            start = time.perf_counter()
            command = [sys.executable, "-m", "ppf", "policy", folder, "--ratio", "0.3", "--json"]
            subprocess.run(command, check=True, capture_output=True)
            processes.append(time.perf_counter() - start)
        result["policy_process_seconds"] = round(float(np.median(processes)), 3)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=600)
    arguments = parser.parse_args()
    write("decision_speed", arguments.seed, {name: measure(name, arguments.seed, arguments.samples) for name in MODELS})
