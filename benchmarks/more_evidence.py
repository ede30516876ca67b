"""The sections of docs/results.md on what can be done after cutting."""

import math
from typing import Any

from page import load, section, table


def compensation() -> list[str]:
    """What biases and refitted weights give back."""
    record = load("compensation")
    if record is None:
        return []
    result = record["result"]
    ratios = sorted({row["ratio"] for row in result["rows"]})
    cells = {(row["method"], row["ratio"]): row for row in result["rows"]}
    methods = list(dict.fromkeys(row["method"] for row in result["rows"]))
    rows = [[method, *(_cell(cells[method, ratio]) for ratio in ratios), _seconds(cells, method, ratios)] for method in methods]
    words = f"""The agent's masks of one study of `{result["model"]}`, cut four ways. Log-perplexity above dense, nats/token, on
        {result["test_tokens"]:,} test tokens of {result["text"]} (dense perplexity {math.exp(result["dense_log_ppl"]):.2f}),
        95 % interval over blocks in brackets. Fitted on {result["calibration_tokens"]:,} other tokens, penalty
        {result["penalty"]:g}. With "dense inputs" each reader is fitted to what it reads in the dense model; `ridge`, which
        `--compensate ridge` takes, fits it to what it reads when all sites below are cut and fitted."""
    gains = [1 - cells["ridge", ratio]["above"] / cells["none", ratio]["above"] for ratio in ratios]
    line = "`ridge` does less damage than none by " + ", ".join(
        f"{100 * gain:.0f} % at {100 * ratio:.0f} %" for gain, ratio in zip(gains, ratios, strict=True)
    )
    header = ["compensation", *(f"{100 * ratio:.0f} %" for ratio in ratios), "seconds"]
    title = f"Compensation without training: `{result['model']}`"
    return [section(title, "compensation", record, words, table(header, rows), line + ".")]


def _cell(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['above']:.4f} ({low:.3f} to {high:.3f})"


def _seconds(cells: dict[tuple[str, float], dict[str, Any]], method: str, ratios: list[float]) -> str:
    return f"{max(cells[method, ratio]['seconds'] for ratio in ratios):.0f}"
