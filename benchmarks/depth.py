"""Does it pay to let whole sub-layers go? Two studies of one model and text, one with --depth, and a rule that drops sub-layers.

python benchmarks/depth.py --study runs/m0 --deep runs/d0
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ppf.config import Target
from ppf.decide import Decider
from ppf.errors import InputError
from ppf.learn.baselines import HEURISTICS
from ppf.llm.load import load_model
from ppf.llm.perplexity import evaluate
from ppf.llm.statistics import layer_statistics
from ppf.llm.surgery import cut
from ppf.llm.text import Text
from ppf.recipes.choices import choose_placement
from ppf.recipes.prune import tokens_per_second
from ppf.space.layout import Layout
from ppf.space.mask import Mask
from record import write

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
TOKENS_PER_BATCH = 1024
ROLES = ("attn", "ffn")


def gone(layout: Layout, kept: np.ndarray) -> dict[str, int]:
    """How many attentions, FFNs and layers are gone as a whole."""
    counts = {role: sum(not left and site.role == role for site, left in zip(layout.sites, kept, strict=True)) for role in ROLES}
    return {**counts, "layers": layout.layers - len(layout.kept_layers(kept))}


def masks_at(ratio: float, plain: Decider, deep: Decider, rule: Any) -> Iterator[tuple[str, Decider, Mask]]:
    """What each method cuts at a ratio."""
    yield "agent", plain, plain.decide(Target(ratio=ratio)).mask
    yield "agent, --depth", deep, deep.decide(Target(ratio=ratio)).mask
    for name, decider in (("block influence", plain), ("block influence, --depth", deep)):
        try:
            yield name, decider, decider.decide(Target(ratio=ratio), rule(decider, ratio)).mask
        except InputError:  # more than its floors allow
            continue


def alone(deep: Decider, dense: float) -> list[dict[str, Any]]:
    """Damage of each whole sub-layer alone, by the probes, on the search text."""
    store, rows = deep.study.store(), []
    for sample in store.all("probe"):
        for site, kept in zip(deep.layout.sites, sample.kept, strict=True):
            if not kept:
                rows.append({"site": site.label, "ratio": sample.ratio, "kl": sample.kl, "above": sample.log_ppl - dense})
    store.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", required=True)
    parser.add_argument("--deep", required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain, deep = Decider(arguments.study), Decider(arguments.deep)
    record = deep.study.record
    loaded = load_model(record["model"]["name"])
    model = loaded.on(choose_placement("cpu"), torch.float32)
    text = Text.load(deep.study.path("text"), deep.layout.fingerprint)
    statistics = layer_statistics(model, deep.layout, text.calibration)
    dense, rows = evaluate(model, text.test, TOKENS_PER_BATCH), []
    for ratio in RATIOS:
        found = list(masks_at(ratio, plain, deep, lambda of, at: HEURISTICS["depth"](statistics, of.importance, of.layout, at)))
        smaller = [cut(model, decider.layout, mask) for _, decider, mask in found]
        speeds = tokens_per_second([model, *smaller], text.test)
        for (name, decider, mask), small, speed in zip(found, smaller, speeds[1:], strict=True):
            kept = mask.allocation.kept
            row = {"ratio": ratio, "method": name, "params": int(decider.layout.kept_params(kept)), **gone(decider.layout, kept)}
            row["above"] = evaluate(small, text.test, TOKENS_PER_BATCH).log_ppl - dense.log_ppl
            rows.append({**row, "tokens_per_second": round(speed), "speed_up": round(speed / speeds[0], 3)})
            print(rows[-1], flush=True)
    write("depth", record["settings"]["seed"], {
        "model": record["model"]["name"], "text": record["settings"]["text"], "test_tokens": int(text.test.size),
        "samples": record["settings"]["samples"], "same_text": plain.study.record["dense"] == record["dense"],
        "dense_log_ppl": dense.log_ppl, "rows": rows, "alone": alone(deep, record["dense"]["search"]["log_ppl"]),
    })  # fmt: skip


if __name__ == "__main__":
    main()
