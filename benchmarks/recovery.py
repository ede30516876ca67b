"""What does training give back? The agent's masks of one study, cut and then recovered, on the study's text and on another.

python benchmarks/recovery.py --study runs/bench --other TEXTS/one.txt
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from page import label
from ppf.config import RecoverConfig, Target
from ppf.decide import Decider
from ppf.llm.load import LoadedModel, adopt_model, load_model, quiet_transformers
from ppf.llm.perplexity import evaluate
from ppf.llm.surgery import cut
from ppf.llm.text import take_blocks, whole_text
from ppf.progress import Progress
from ppf.recipes.choices import choose_placement
from ppf.recipes.recover import recover
from record import write

TOKENS_PER_BATCH = 1024
CPU = choose_placement("cpu")
METHODS: dict[str, dict[str, Any]] = {"lora": {}, "full": {"full": True}, "lora, text alone": {"teacher": "none"}}


def on_other(model: PreTrainedModel, tokenizer: Any, blocks: np.ndarray) -> float:
    """Log-perplexity of a model on some blocks, nats/token, in float32."""
    return evaluate(adopt_model(model, tokenizer).on(CPU, torch.float32), blocks, TOKENS_PER_BATCH).log_ppl


def rows_of(decider: Decider, dense: LoadedModel, arguments: argparse.Namespace, other: np.ndarray) -> Iterator[dict[str, Any]]:
    """One row a ratio and method."""
    record = decider.study.record
    for ratio in arguments.ratios:
        small = adopt_model(cut(dense.model, dense.layout, decider.decide(Target(ratio=ratio)).mask), dense.tokenizer)
        before = on_other(small.model, small.tokenizer, other)
        for name, options in METHODS.items():
            config = RecoverConfig(
                "", text=record["settings"]["text"], tokens=arguments.tokens, seq_len=record["seq_len"], device="cpu",
                test_tokens=arguments.test_tokens, seed=record["settings"]["seed"], **options,
            )  # fmt: skip
            trained = recover(config, small, {}, None if config.teacher == "none" else dense, Progress(quiet=True))
            found = trained.plan["recovered"]
            after = on_other(trained.model, trained.tokenizer, other)
            shown = [f"{value:.4f}" for value in (found["before"]["log_ppl"], found["after"]["log_ppl"], before, after)]
            print(f"{ratio:.2f} {name:<18} {' -> '.join(shown[:2])}; other text {' -> '.join(shown[2:])}", flush=True)
            yield {"ratio": ratio, "method": name, "other": {"before": before, "after": after}} | {
                key: found[key] for key in ("dense", "before", "after", "gain", "rank", "lr", "steps", "batch", "tokens", "seconds")
            }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", required=True)
    parser.add_argument("--other", required=True, help="another text to measure on, never trained on")
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--test-tokens", type=int, default=16_384)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.3, 0.4, 0.5])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    decider = Decider(arguments.study)
    record = decider.study.record
    dense = load_model(record["model"]["name"])
    other = take_blocks(whole_text(arguments.other, dense.tokenizer), record["seq_len"], arguments.test_tokens, 0, arguments.other)
    rows = list(rows_of(decider, dense, arguments, other))
    text, seq_len = label(record["settings"]["text"]), record["seq_len"]
    protocol = {"text": text, "other": label(arguments.other), "seq_len": seq_len, "test_tokens": arguments.test_tokens}
    whole = {"text": rows[0]["dense"]["log_ppl"], "other": on_other(dense.model, dense.tokenizer, other)}
    model = Path(record["model"]["name"]).name
    write("recovery", record["settings"]["seed"], {"model": model, **protocol, "dense": whole, "rows": rows})


if __name__ == "__main__":
    main()
