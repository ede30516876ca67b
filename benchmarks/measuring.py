"""How fast are masks measured beside a plain loop over the same tokens, and what does sharing the lower layers add?

    python benchmarks/measuring.py --stories MODELS/stories260K --study runs/bench

Everything runs in one process set up as a measuring one: one thread, large buffers kept. All ways take turns.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from ppf.llm.architectures import layout_of_model
from ppf.llm.collect import probes
from ppf.llm.engines.bench import Bench
from ppf.llm.engines.service import ENVIRONMENT
from ppf.llm.load import load_model, quiet_transformers
from ppf.llm.masking import masked, narrowed
from ppf.llm.perplexity import measure, reference_of
from ppf.llm.shared_layers import evenly
from ppf.llm.text import Text
from ppf.recipes.choices import TOKENS_PER_BATCH, choose_seq_len
from ppf.space.allocation import Allocation, allocate
from ppf.space.budget import Budget
from ppf.space.importance import Importance
from ppf.space.layout import Layout
from ppf.space.mask import Mask, select
from ppf.space.policy import Policy
from ppf.study import StudyFolder
from record import write

BATCH = TOKENS_PER_BATCH["cpu"]
WIDE = {
    "hidden_size": 768, "intermediate_size": 2688, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4,
    "vocab_size": 8192, "max_position_embeddings": 512,
}  # fmt: skip


class Ways:
    """The ways to go over one text.

    Args:
        model: Dense.
        layout: Its layout.
        batches: How many of 1,024 tokens.
        seed: Of the tokens and of the order of units.
    """

    def __init__(self, model: PreTrainedModel, layout: Layout, batches: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        length = choose_seq_len(None, model.config.max_position_embeddings)
        self.blocks = rng.integers(3, model.config.vocab_size, (batches * BATCH // length, length))
        self.model, self.layout = model, layout
        self.order = Importance(tuple(rng.random(units).astype(np.float32) for units in layout.units), "random", "none")
        self.bench = Bench(model, layout, Text("random", self.blocks, self.blocks, self.blocks[:0], self.blocks), BATCH)
        self.bench.prepare("search")
        self.reference = reference_of(model, self.blocks, BATCH)

    def plain(self) -> float:
        """The loss by a loop over ``model(...)``, as anyone would write it."""
        total, size = 0.0, max(1, BATCH // self.blocks.shape[1])
        with torch.inference_mode():
            for start in range(0, len(self.blocks), size):
                ids = torch.from_numpy(self.blocks[start : start + size])
                logits = self.model(input_ids=ids, use_cache=False).logits
                targets = ids[:, 1:].flatten()
                total += functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, reduction="sum").item()
        return total / (len(self.blocks) * (self.blocks.shape[1] - 1))

    def ours(self, mask: Mask) -> None:
        """As the engines measure."""
        assert not self.bench.measure(mask, "search", None).reason

    def unshared(self, mask: Mask) -> None:
        """The same, every layer of every mask."""
        with narrowed(self.model, self.layout, mask):
            measure(self.model, self.blocks, self.reference, BATCH)

    def zeros(self, mask: Mask) -> None:
        """Zeros in the place of what is removed."""
        with masked(self.model, self.layout, mask):
            measure(self.model, self.blocks, self.reference, BATCH)

    def nearly_all(self) -> Mask:
        """One channel of the first FFN goes: everything is to be done, and nothing can be shared."""
        kept = self.layout.units.copy()
        kept[[site.role for site in self.layout.sites].index("ffn")] -= 1
        return select(Allocation(kept), self.order, self.layout)

    def thirty(self) -> Mask:
        """30 % of the prunable parameters gone, everywhere alike."""
        allocation = allocate(Policy.uniform(self.layout), Budget.from_ratio(0.3, self.layout), self.layout)
        return select(allocation, self.order, self.layout)


def timed(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Float[rounds, 2] for each job: seconds on the wall and of the processor, in turns, the first round thrown away."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for turn in range(rounds + 1):
        for name in list(jobs)[:: 1 if turn % 2 else -1]:
            start = time.perf_counter(), time.process_time()
            jobs[name]()
            found[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: np.array(times[1:]) for name, times in found.items()}


def summary(values: np.ndarray, digits: int) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": round(float(median), digits), "low": round(float(low), digits), "high": round(float(high), digits)}


def beside(times: dict[str, np.ndarray], first: str, tokens: int) -> dict[str, Any]:
    """Of each job its speed, and how many times as fast as the first it was in the same round."""
    return {
        name: {
            clock: {
                "tokens_per_second": summary(tokens / found[:, index], 0),
                "speed_beside": summary(times[first][:, index] / found[:, index], 3),
            }
            for index, clock in enumerate(("wall", "processor"))
        }
        for name, found in times.items()
    }


def measured(model: PreTrainedModel, layout: Layout, batches: int, rounds: int, seed: int) -> dict[str, Any]:
    ways = Ways(model, layout, batches, seed)
    dense, most, some = ways.plain(), ways.nearly_all(), ways.thirty()
    assert abs(dense - float(measure(model, ways.blocks, None, BATCH)[0].mean())) < 1e-4  # the same loss
    jobs: dict[str, Callable[[], object]] = {
        "plain loop": ways.plain,
        "one channel gone": lambda: ways.ours(most),
        "30 % gone": lambda: ways.ours(some),
        "30 % gone, zeros": lambda: ways.zeros(some),
    }
    each = [select(item.allocation, ways.order, layout) for item in probes(layout, (0.5,))]
    pairs: dict[str, Callable[[], object]] = {
        "every layer": lambda: list(map(ways.unshared, each)),
        "shared": lambda: list(map(ways.ours, each)),
    }
    tokens = int(ways.blocks.size)
    return {
        "layers": layout.layers, "parameters": layout.total, "vocabulary": model.config.vocab_size, "tokens": tokens,
        "ways": beside(timed(jobs, rounds), "plain loop", tokens),
        "probes": len(each),
        "sharing": beside(timed(pairs, max(2, rounds // 6)), "every layer", tokens * len(each)),
    }  # fmt: skip


def saved(study: StudyFolder) -> dict[str, Any]:
    """The share of the layers that the masks of a study leave out, by purpose, if the state that enters each layer is kept."""
    layout = study.layout
    layers = np.array([site.layer for site in layout.sites])
    entries = (0, *evenly(layout.layers, layout.layers))

    def skipped(kept: Sequence[int]) -> float:
        gone = layers[np.array(kept) < layout.units]
        return max(entry for entry in entries if entry <= gone.min(initial=layout.layers)) / layout.layers

    found: dict[str, list[float]] = {}
    for sample in study.store().all():
        found.setdefault(sample.purpose, []).append(skipped(sample.kept))
    choices = (study.plan("importance") or {"masks": 0})["masks"]
    if choices:
        found["choosing importance"] = [float(layer) / layout.layers for layer in np.resize(layers, choices)]
    found["all"] = [share for shares in found.values() for share in shares]
    return {name: {"masks": len(shares), "left_out": round(float(np.mean(shares)), 4)} for name, shares in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--stories", default=None, help="folder of stories260K")
    parser.add_argument("--study", default=None, help="a fitted study, to count what its masks share")
    parser.add_argument("--quick", action="store_true", help="few rounds, no large model")
    arguments = parser.parse_args()
    quiet_transformers()
    rounds = 4 if arguments.quick else arguments.rounds
    names = {"ref-a": "ref-a", **({"stories260K": arguments.stories} if arguments.stories else {})}
    models = {}
    for name, place in names.items():
        loaded = load_model(place)
        models[name] = measured(loaded.model.float(), loaded.layout, 4, rounds, arguments.seed)
    if not arguments.quick:
        torch.manual_seed(arguments.seed)
        wide = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE)).eval()
        models["random"] = measured(wide, layout_of_model(wide), 1, rounds // 2, arguments.seed)
    result: dict[str, Any] = {"models": models, "rounds": rounds}
    if arguments.study:
        result["study"] = saved(StudyFolder(Path(arguments.study)))
    write("measuring", arguments.seed, result)


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):  # glibc reads its own before main
        sys.exit(subprocess.run([sys.executable, *sys.argv], env={**os.environ, **ENVIRONMENT}).returncode)
    torch.set_num_threads(1)
    main()
