"""What does compensation give back? The agent's masks of one study, cut without, with biases, and with weights fitted again.

python benchmarks/compensation.py --study runs/bench
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ppf.config import Target
from ppf.decide import Decider
from ppf.llm.compensation import Fill, reader_means
from ppf.llm.load import load_model
from ppf.llm.perplexity import evaluate
from ppf.llm.ridge import PENALTY, RidgeWeights, fit_ridge
from ppf.llm.surgery import cut
from ppf.llm.text import Text
from ppf.recipes.choices import choose_placement
from record import write

TOKENS_PER_BATCH = 1024
RATIOS = (0.2, 0.3, 0.4, 0.5)
TEST_TOKENS = 16_384


def rows_of(decider: Decider, model: PreTrainedModel, calibration: np.ndarray, test: np.ndarray, dense: np.ndarray) -> Any:
    """One row a ratio and method: log-perplexity above dense on the test text, its interval over blocks, seconds of fitting."""
    layout = decider.layout
    for ratio in RATIOS:
        mask = decider.decide(Target(ratio=ratio)).mask
        for method in ("none", "bias", "ridge, dense inputs", "ridge"):
            start = time.perf_counter()
            fill: Fill | None = reader_means(model, layout, calibration) if method == "bias" else None
            ridge = method.startswith("ridge")
            fitted: RidgeWeights | None = (
                fit_ridge(model, layout, mask, calibration, sequential=method == "ridge") if ridge else None
            )
            seconds = time.perf_counter() - start
            above = evaluate(cut(model, layout, mask, fill, fitted), test, TOKENS_PER_BATCH).blocks - dense
            draws = np.random.default_rng(0).integers(0, len(above), (2000, len(above)))
            interval = np.quantile(above[draws].mean(axis=1), [0.025, 0.975]).tolist()
            print(f"{ratio:.2f} {method:<20} {above.mean():.4f} nats/token, {seconds:.1f} s", flush=True)
            yield {"ratio": ratio, "method": method, "above": above.mean(), "interval": interval, "seconds": round(seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    decider = Decider(arguments.study)
    record = decider.study.record
    loaded = load_model(record["model"]["name"])
    model = loaded.on(choose_placement("cpu"), torch.float32)
    text = Text.load(decider.study.path("text"), decider.layout.fingerprint)
    wanted = max(1, TEST_TOKENS // record["seq_len"])
    test = text.test[np.linspace(0, len(text.test) - 1, min(wanted, len(text.test))).astype(int)]
    dense = evaluate(model, test, TOKENS_PER_BATCH).blocks
    result = {
        "model": record["model"]["name"],
        "text": record["settings"]["text"],
        "calibration_tokens": int(text.calibration.size),
        "test_tokens": int(test.size),
        "penalty": PENALTY,
        "dense_log_ppl": float(dense.mean()),
        "rows": list(rows_of(decider, model, text.calibration, test, dense)),
    }
    write("compensation", record["settings"]["seed"], result)


if __name__ == "__main__":
    main()
