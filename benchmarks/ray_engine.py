"""What does the Ray engine cost beside the local one? Samples per second with one and two workers, and the time that is lost.

All engines stay open and take turns at the same masks. What is lost is the workers' time that went into no measurement.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import contextlib
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppf.llm.engines.bench import Engine
from ppf.llm.engines.local import LocalEngine
from ppf.llm.engines.ray_cluster import Cluster, RayEngine, import_ray
from ppf.llm.load import LoadedModel, load_model
from ppf.llm.scores import score_units
from ppf.llm.text import TextSizes, load_text
from ppf.recipes.choices import tokens_per_batch
from ppf.space.allocation import allocate
from ppf.space.budget import Budget
from ppf.space.mask import Mask, select
from ppf.space.policy import Policy
from record import write

SIZES = TextSizes(256, 512, 1024, 0, 512)
WORKERS = (1, 2)


def masks_of(loaded: LoadedModel, calibration: np.ndarray, count: int, seed: int) -> list[Mask]:
    """Random masks at 30 %."""
    layout, rng = loaded.layout, np.random.default_rng(seed)
    order = score_units(loaded.model, layout, calibration, "magnitude", "pydocs", seed)
    budget = Budget.from_ratio(0.3, layout)
    policies = [Policy(0.7 + rng.normal(0, 0.1, len(layout.sites))) for _ in range(count)]
    return [select(allocate(policy, budget, layout), order, layout) for policy in policies]


def engines(
    loaded: LoadedModel, text: Path, masks: list[Mask], stack: contextlib.ExitStack
) -> dict[str, tuple[Engine, int, float]]:
    """All engines, open."""
    ray, batch = import_ray(None), tokens_per_batch(torch.device("cpu"))
    start = time.perf_counter()
    ray.init(address="local", num_cpus=sum(WORKERS), include_dashboard=False, log_to_driver=False, configure_logging=False)
    stack.callback(ray.shutdown)
    started, found = time.perf_counter() - start, {}
    assert loaded.folder is not None  # a model of the package lies in one
    for workers in WORKERS:
        for name in ("local", "ray"):
            start = time.perf_counter()
            if name == "local":
                engine: Engine = LocalEngine(loaded.folder, text, loaded.layout, "float32", workers, batch)
            else:
                cluster = Cluster(None, workers, 0.0)
                engine = RayEngine("ref-a", loaded.digest, text, loaded.layout, "float32", batch, cluster)
            stack.callback(engine.close)
            list(engine.measure(masks[: 2 * workers]))
            seconds = time.perf_counter() - start + (started if name == "ray" else 0.0)
            found[f"{name} {workers}"] = engine, workers, seconds
    return found


def measured(count: int, rounds: int, seed: int) -> dict[str, Any]:
    loaded = load_model("ref-a")
    words = load_text("pydocs", loaded.tokenizer, SIZES, seed, loaded.model)
    masks = masks_of(loaded, words.calibration, count, seed)
    runs: dict[str, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        words.save(Path(folder) / "text", loaded.layout.fingerprint)
        opened = engines(loaded, Path(folder) / "text", masks, stack)
        for _ in range(rounds):
            for name, (engine, workers, _) in opened.items():
                start = time.perf_counter()
                results = [result for _, result in engine.measure(masks)]
                wall = time.perf_counter() - start
                lost = 1 - sum(result.seconds for result in results) / (workers * wall)
                runs.setdefault(name, []).append((len(masks) / wall, lost))
    return {
        "masks": count,
        "rounds": rounds,
        "search_tokens": SIZES.search,
        "engines": {
            name: {
                "start_seconds": round(opened[name][2], 1),
                "samples_per_second": [round(rate, 2) for rate, _ in found],
                "median": round(statistics.median(rate for rate, _ in found), 2),
                "share_lost": round(statistics.median(lost for _, lost in found), 4),
            }
            for name, found in runs.items()
        },
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--masks", type=int, default=36)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    write("ray_engine", arguments.seed, measured(arguments.masks, arguments.rounds, arguments.seed))
