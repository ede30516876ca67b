"""The sections of docs/results.md on what can be done after cutting."""

import math
from typing import Any

from page import load, section, table


def compensation() -> list[str]:
    """What biases and weights fitted again give back."""
    record = load("compensation")
    if not record:
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


def recovery() -> list[str]:
    """What training after the cut gives back."""
    record = load("recovery")
    if not record:
        return []
    result = record["result"]
    cells = {(row["method"], row["ratio"]): row for row in result["rows"]}
    methods, ratios = (list(dict.fromkeys(row[key] for row in result["rows"])) for key in ("method", "ratio"))
    parts = []
    for place, name in (("text", result["text"]), ("other", result["other"])):
        dense = result["dense"][place]
        rows = [["none", *(f"{_recovered(cells[methods[0], ratio], place)[0] - dense:.4f}" for ratio in ratios), ""]]
        for method in methods:
            after = [_recovered(cells[method, ratio], place)[1] - dense for ratio in ratios]
            rows.append([method, *(f"{value:.4f}" for value in after), _seconds(cells, method, ratios)])
        title = f"{name}, dense perplexity {math.exp(dense):.2f}"
        parts.append(f"{title}:\n\n{table(['training', *(f'{100 * ratio:.0f} %' for ratio in ratios), 'seconds'], rows)}")
    first = result["rows"][0]
    words = f"""The agent's masks of one study of `{result["model"]}`, cut and trained with `ppf recover` on {first["tokens"]:,}
        tokens of {result["text"]} that are not tested on: LoRA adapters of rank {first["rank"]}, or all weights, beside the dense
        model; and adapters on the text alone, without it. Log-perplexity above dense, nats/token, on {result["test_tokens"]:,}
        test tokens of the same text and of another; below 0 it is better than the dense model there."""
    lines = "; ".join(f"{method}: {_shares(cells, method, ratios, result['dense']['text'])}" for method in methods)
    shares = f"Share of the damage on {result['text']} that is gone: {lines}."
    return [section(f"Recovery by training: `{result['model']}`", "recovery", record, words, *parts, shares)]


def _shares(cells: dict[tuple[str, float], dict[str, Any]], method: str, ratios: list[float], dense: float) -> str:
    rows = [cells[method, ratio] for ratio in ratios]
    gone = [row["gain"]["log_ppl"] / (row["before"]["log_ppl"] - dense) for row in rows]
    return ", ".join(f"{100 * share:.0f} % at {100 * ratio:.0f} %" for share, ratio in zip(gone, ratios, strict=True))


def _recovered(row: dict[str, Any], place: str) -> list[float]:
    """Log-perplexity before and after on one of the two texts."""
    return [row[when]["log_ppl"] if place == "text" else row["other"][when] for when in ("before", "after")]


def family_tasks() -> list[str]:
    """Every family in the harness, and trained."""
    record = load("family_tasks")
    if not record:
        return []
    result = record["result"]
    rows = []
    for row in result["rows"]:
        scores = [f"{one['log_ppl']:.4f} ({one['off']:.0e})" for one in row["lm_eval"].values()]
        rows.append([row["family"], *scores, *(f"{row['recover'][when]:.4f}" for when in ("before", "after", "reloaded"))])
    words = f"""Tiny random models, dense and without 30 %. Harness: nats of the last word of {result["items"]} items, in
        brackets the difference from a count by hand. Recovery: KL from the dense model, nats/token, before and after
        {result["steps"]} steps of LoRA of rank {result["rank"]}, and of the folder that was written."""
    header = ["family", "harness, dense", "harness, pruned", "KL before", "after", "reloaded"]
    return [section("Tasks and recovery of every family", "family_tasks", record, words, table(header, rows))]


def _cell(row: dict[str, Any]) -> str:
    low, high = row["interval"]
    return f"{row['above']:.4f} ({low:.3f} to {high:.3f})"


def _seconds(cells: dict[tuple[str, float], dict[str, Any]], method: str, ratios: list[float]) -> str:
    return f"{max(cells[method, ratio]['seconds'] for ratio in ratios):.0f}"


def order() -> list[str]:
    """How well masks of one size are ordered, over all fits."""
    record = load("order")
    if not record:
        return []
    rows, seeds = [], set()
    for name, model in record["result"]["models"].items():
        seeds.add(len(model["seeds"]))
        for kind, fits in model["predictors"].items():
            taus = {ratio: [fit["tau_within"][ratio] for fit in fits] for ratio in fits[0]["tau_within"]}
            cells = [f"{sum(found) / len(found):.2f} ({min(found):.2f})" for found in taus.values()]
            rows.append([name, kind, *cells, f"{sum(fit['mse'] for fit in fits) / len(fits):.1e}"])
    first = next(iter(record["result"]["models"].values()))
    words = f"""Kendall's tau of the damage among {first["masks"]} held-out masks, those of one ratio, around each fit's own
        policies and on the text that it measured on; {first["fitted"]} other masks were fitted. Means over {max(seeds)} fits, the
        worst in brackets; then the mean squared error on the scale PPL_dense / PPL."""
    header = [
        "model",
        "predictor",
        *(f"{100 * float(ratio):.0f} %" for ratio in first["predictors"]["additive"][0]["tau_within"]),
        "MSE",
    ]
    return [section("The order of masks of one size, over all fits", "order", record, words, table(header, rows))]
