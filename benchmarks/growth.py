"""How does the cost of a fit grow with layers, tokens and samples? Whole fits of narrow random Llamas, one thing changed at a time.

Weights are random and damages mean nothing; what is counted is work. Seconds are those that each study keeps of its stages.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from measuring import saved
from ppf.artifact import read_json
from ppf.config import FitConfig
from ppf.llm.load import quiet_transformers
from ppf.progress import Progress
from ppf.recipes.fit import fit
from record import HERE, write

EMBEDDED = HERE.parent / "src" / "ppf" / "models" / "ref-a"
SHAPE = {
    "hidden_size": 64, "intermediate_size": 172, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
GROUPS = {
    "importance": ("importance", "choosing importance"),
    "measuring": ("measuring",),
    "learning": ("search", "predictor", "agent", "nested agent"),
    "beginning": ("loading", "text", "dense model"),
}
"""Stages by the beginning of their names; each belongs to the first group that knows it."""


@dataclass(frozen=True)
class Size:
    """Of one fit.

    Attributes:
        layers: Of the model.
        tokens: For each mask.
        samples: Masks.
    """

    layers: int = 4
    tokens: int = 1024
    samples: int = 200


ROWS = {"layers": (4, 8, 16, 32), "tokens": (1024, 2048, 4096, 8192, 16_384), "samples": (100, 200, 400, 1000)}
QUICK = {"layers": (4, 8), "tokens": (1024, 2048), "samples": (100, 200)}


def sizes(grid: Mapping[str, tuple[int, ...]]) -> Iterator[Size]:
    """Each once."""
    yield from dict.fromkeys(replace(Size(), **{name: value}) for name, values in grid.items() for value in values)


def random_model(layers: int, folder: Path, seed: int) -> None:
    """Saves a model and the embedded model's tokenizer."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    end = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, bos_token_id=end, eos_token_id=end, **SHAPE)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fitted(size: Size, folder: Path, seed: int) -> dict[str, Any]:
    """What one fit took."""
    model, place = folder / f"{size.layers} layers", folder / "-".join(map(str, asdict(size).values()))
    if not model.exists():
        random_model(size.layers, model, seed)
    config = FitConfig(
        str(model), str(place), samples=size.samples, search_tokens=size.tokens, calibration_tokens=2048, validation_tokens=0,
        test_tokens=2048, device="cpu", workers=1, seed=seed,
    )  # fmt: skip
    start = time.perf_counter()
    study = fit(config, Progress(quiet=True))
    wall, report = time.perf_counter() - start, read_json(place / "report.json")
    groups = dict.fromkeys(GROUPS, 0.0)
    for stage, seconds in report["seconds"].items():
        groups[next(group for group, names in GROUPS.items() if stage.startswith(names))] += seconds
    return {
        **asdict(size), "wall_seconds": round(wall, 1), "groups": {name: round(value, 2) for name, value in groups.items()},
        "seconds": report["seconds"], "measured_tokens": report["tokens"]["measured"],
        "measuring_seconds": report["measuring_seconds"], "left_out": saved(study)["all"]["left_out"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="the smallest sizes only")
    arguments = parser.parse_args()
    quiet_transformers()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes(QUICK if arguments.quick else ROWS):
            rows.append(fitted(size, Path(folder), arguments.seed))
            print(size, rows[-1]["wall_seconds"], rows[-1]["groups"], flush=True)
    write("growth", arguments.seed, {**SHAPE, "base": asdict(Size()), "rows": rows})


if __name__ == "__main__":
    main()
