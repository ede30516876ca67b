"""The sections of docs/results.md on what goes besides units, and on memory."""

import math
from typing import Any

from page import load, section, table


def depth() -> list[str]:
    """Whether whole sub-layers are worth it."""
    record = load("depth")
    if not record:
        return []
    result = record["result"]
    cells = {(row["method"], row["ratio"]): row for row in result["rows"]}
    methods, ratios = (list(dict.fromkeys(row[key] for row in result["rows"])) for key in ("method", "ratio"))
    rows = [[method, *(_lost(cells[method, ratio]) for ratio in ratios)] for method in methods]
    cheapest = min(result["alone"], key=lambda one: one["kl"] / one["ratio"])
    words = f"""One study of `{result["model"]}` with `--depth` and one without, {result["samples"]} masks each. Log-perplexity
        above dense, nats/token, on {result["test_tokens"]:,} test tokens of {result["text"]} (dense perplexity
        {math.exp(result["dense_log_ppl"]):.2f}), and in brackets how many attentions, FFNs and whole layers are gone. Block
        influence drops sub-layers, the least influential first. Alone, {cheapest["site"]} is the cheapest for its size: a
        divergence of {cheapest["kl"]:.3f} for {100 * cheapest["ratio"]:.1f} % of the prunable parameters."""
    header = ["policy", *(f"{100 * ratio:.0f} %" for ratio in ratios)]
    return [section(f"Whole sub-layers: `{result['model']}`", "depth", record, words, table(header, rows))]


def _lost(row: dict[str, Any]) -> str:
    return f"{row['above']:.4f} ({row['attn']}, {row['ffn']}, {row['layers']})"


def memory() -> list[str]:
    """The most memory that stages take."""
    record = load("memory")
    if not record:
        return []
    result = record["result"]
    weights, shard = result["weights"] / 1e9, result["largest_shard"] / 1e9
    bars = dict.fromkeys(("prune", "export"), shard + 1) | dict.fromkeys(("score", "evaluation", "fit"), weights + 2)
    kinds = ("peak", "own", "together")
    rows = [
        [name, *(f"{found[kind] / 1e9:.2f} GB" for kind in kinds), f"{bars[name]:.2f} GB" if name in bars else "-"]
        for name, found in result["stages"].items()
    ]
    words = f"""A random Llama in bfloat16: {weights:.2f} GB of weights in files of at most {shard:.2f} GB, contexts of
        {result["tokens"]:,} tokens, a process for each stage. Peak: all that was resident in one process, pages of mapped files
        included; own: without these, and together: pages that several share counted once, both with the worker of a fit, whose
        masks keep 75 and 50 %. Prune is `--plan` of an export, from the weight files; export is to GGUF; score is Taylor's. Aim:
        what we set out to stay below."""
    return [section("Memory", "memory", record, words, table(["stage", *kinds, "aim"], rows))]
