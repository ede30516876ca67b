"""Writes docs/results.md from benchmarks/results/*.json."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INTRO = """# Results

Every figure comes from a file in `benchmarks/results`, named above each table, with its command, seed, commit and machine.
This page is written by `make bench`. Times were taken on shared, busy cores; read them as upper bounds.
"""


BENCHES = ("ref-a", "stories260K", "ref-q")


def load(name: str) -> dict[str, Any] | None:
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def heading(title: str, name: str, record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}, load {machine['load']}, torch {machine['torch']}"
    seed = record.get("seed", record["result"].get("seeds"))
    return f"## {title}\n\n`benchmarks/results/{name}.json`: `{record['command']}`, seed {seed}; {where}.\n"


def demo() -> str:
    record = load("demo")
    result = record["result"]
    rows = [
        [
            f"{100 * row['ratio']:.1f} %", f"{row['predicted']:.2f}", f"{row['measured']:.2f}", f"{row['uniform']:.2f}",
            f"{row['params']:,}", f"{row['bytes'] / 1e6:.2f} MB",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    first = result["heldout"]["corrected"]
    judged = [
        [
            kind + (" (decides)" if kind == result["predictor"] else ""),
            f"{found['mse']:.1e}", f"{found['mae']:.4f}", f"{found['tau']:.3f}",
            " / ".join(f"{value:.2f}" for value in found["tau_within"].values()),
            " / ".join(f"{value:.2f}" for value in found["tau_log_ppl_within"].values()), f"{found['z']:.2f}",
        ]
        for kind, found in result["heldout"].items()
    ]  # fmt: skip
    ratios = " / ".join(f"{100 * float(ratio):.0f}" for ratio in first["tau_within"])
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
    return "\n".join(
        [
            heading("The demo: `ref-a` on `pydocs`", "demo", record),
            f"Dense perplexity {result['rows'][0]['dense']:.2f} on the test text.",
            f"The whole demo took {result['wall_seconds']:.0f} s.\n",
            table(["ratio", "predicted", "measured", "uniform policy", "parameters", "file"], rows),
            "\nSeconds by stage: " + seconds + ".\n",
            f"### The predictors on {first['count']} held-out masks\n",
            "MSE is on the scale PPL_dense / PPL, MAE in nats/token of log-perplexity; tau is Kendall's, of the damage over all",
            f"masks, then among masks of one size ({ratios} %) against measured damage and against measured log-perplexity;",
            "error/std is the root mean square of error over predicted standard deviation.\n",
            table(["predictor", "MSE", "MAE", "tau", "tau within, damage", "tau within, log-perplexity", "error/std"], judged),
        ]
    )


def bench(name: str) -> str:
    record = load(f"bench-{name}")
    result = record["result"]
    ratios = sorted({row["ratio"] for row in result["rows"]})
    methods: dict[str, dict[float, dict[str, Any]]] = {}
    for row in result["rows"]:
        methods.setdefault(row["method"], {})[row["ratio"]] = row
    rows = []
    for method, found in methods.items():
        cost = max(row["tokens"] + row["shared_tokens"] for row in found.values()) / 1e6
        rows.append([method, f"{cost:.2f} M", *(_cell(found[ratio]) if ratio in found else "-" for ratio in ratios)])
    seeds = len(result["seeds"])
    return "\n".join(
        [
            heading(f"Ways to choose: `{result['model']}` on {result['text']}", f"bench-{name}", record),
            f"Log-perplexity above dense, nats/token, on {result['test_tokens']:,} test tokens (dense perplexity",
            f"{min(result['dense_ppl']):.2f}); {seeds} fit{'s' if seeds > 1 else ''} of {result['samples']} masks of",
            f"{result['search_tokens']:,} tokens. Tokens: run through the model for one ratio, what serves all ratios included.",
            "In brackets by how much it is worse than static pruning on the same blocks, 95 % interval over blocks.",
            "Bold: the least.\n",
            table(["method", "tokens", *(f"{100 * ratio:.0f} %" for ratio in ratios)], rows),
        ]
    )


def _cell(row: dict[str, Any]) -> str:
    value = f"{row['above']:.4f}"
    value = f"**{value}**" if row["regret"] == 0 else value
    if row["method"] == "static" or "worse" not in row:
        return value
    low, high = row["worse"]["blocks"]
    return f"{value} ({low:+.3f} to {high:+.3f})"


def agents() -> str:
    record = load("agents")
    result = record["result"]
    columns = ("mean_gain", "worst_gain", "shortfall", "worst_shortfall", "gain_up_to_part", "gain_beyond_part")
    rows = [
        [name, *(_range(found[column], 4) for column in columns), _range(found["questions"], 0), _range(found["seconds"], 0)]
        for name, found in result["learners"].items()
    ]
    part = f"{100 * result['part']:.0f} %"
    header = ["learner", "mean gain", "worst ratio", "shortfall", "worst", f"gain up to {part}", "beyond", "questions", "seconds"]
    return "\n".join(
        [
            heading("Which learner for the agent", "agents", record),
            f"Each learner may ask the predictor {result['questions']:,} times, and begins with the additive optimum. Gain:",
            "log(damage of the start / damage of the policy) under the predictor's objective, over",
            f"{result['ratios']} ratios that none was trained on; 0 is the start. Shortfall: what searching each of these ratios",
            "alone gains beyond that. Means over the seeds, with the least and the most in brackets.\n",
            table(header, rows),
        ]
    )


def _range(values: list[float], digits: int) -> str:
    """Mean of the seeds, and where they lie."""
    mean, least, most = (f"{value:,.{digits}f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def reference() -> str:
    record = load("reference")
    models = record["result"]["models"]
    texts = list(next(iter(models.values()))["perplexity"])
    rows = [
        [
            f"{name}: {found['family']}, {found['layers']} layers, {found['parameters']:,} parameters",
            *(f"{found['perplexity'][text]['ppl']:.1f}" for text in texts),
        ]
        for name, found in models.items()
    ]
    return "\n".join(
        [
            heading("The reference models", "reference", record),
            f"Perplexity on {record['result']['tokens']:,} tokens of text that neither was trained on,",
            "in blocks of half the context.\n",
            table(["model", *texts], rows),
        ]
    )


def speed() -> str:
    record = load("decision_speed")
    rows = []
    for name, found in record["result"].items():
        for kind, one in found["predictors"].items():
            rows.append(
                [
                    f"{name}, {found['sites']} sites", kind,
                    f"{one['one_mask_ms']['median']:.2f} ({one['one_mask_ms']['p99']:.2f})", f"{one['masks_per_second']:,}",
                ]
            )  # fmt: skip
    decisions = [
        [
            name,
            f"{found['decision_ms']['median']:.1f}",
            f"{found['decision_ms']['p99']:.1f}",
            f"{found['policy_process_seconds']:.2f}",
        ]
        for name, found in record["result"].items()
    ]  # fmt: skip
    return "\n".join(
        [
            heading("Prediction and decision, at the layouts of large models", "decision_speed", record),
            "One thread; predictors fitted to synthetic masks. No weights are involved.\n",
            table(["layout", "predictor", "one mask, ms, median (p99)", "masks/s in batches"], rows),
            "",
            table(["layout", "decision, ms, median", "p99", "whole `ppf policy` process, s"], decisions),
        ]
    )


def gguf() -> str:
    record = load("gguf")
    result, wide = record["result"], record["result"]["stand_in"]
    rows = [
        [
            f"{row['model']}, {row['quant']}", row["arch"], f"{row['bytes'] / 1e6:.2f} MB",
            f"{row['fallbacks']} of {row['matrices']}", f"{row['ppl_transformers']:.2f}", f"{row['ppl']:.2f}",
            f"{row['logits']:.1e}",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    header = ["file", "architecture", "size", "finer type", "perplexity, transformers", "llama.cpp", "logits off by"]
    speeds = [
        [
            f"{name}: {row['model']}, {row['quant']}", _quartiles(row["tokens_per_second"], 0), _quartiles(row["speedup"], 2),
            f"{row['promised']:.2f}",
        ]
        for name, found in (("`ref-a`", result["rows"]), ("random", wide["rows"]))
        for row in found
    ]  # fmt: skip
    shape = wide["shape"]
    return "\n".join(
        [
            heading("GGUF files in llama.cpp", "gguf", record),
            f"`ref-a`, dense and with {100 * result['ratio']:.0f} % of the prunable parameters gone, channels in multiples of 1",
            f"and 32; llama-cpp-python {result['llama_cpp_python']}. Perplexity on {result['tokens']:,} test tokens in blocks of",
            f"{result['prompt']}; transformers in float32. Finer type: matrices of a width that blocks do not divide.\n",
            table(header, rows),
            f"\nPrompts of {result['prompt']} tokens, one thread, files in turns, medians of {result['repeats']} (quartiles).",
            f"Random: a Llama of {shape['num_hidden_layers']} layers, {shape['hidden_size']} wide, without training.\n",
            table(["file", "tokens/s", "times as fast as dense", "by removed operations"], speeds),
        ]
    )


def _quartiles(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:,.{digits}f} ({found['low']:,.{digits}f} to {found['high']:,.{digits}f})"


def main() -> None:
    parts = [INTRO, demo(), *(bench(name) for name in BENCHES if load(f"bench-{name}"))]
    parts += [reference()] if load("reference") else []
    parts += [agents()] if load("agents") else []
    parts += [gguf()] if load("gguf") else []
    parts += [speed()]
    (HERE.parent / "docs" / "results.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
