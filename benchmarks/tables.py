"""Writes docs/results.md, and the table of docs/reliability.md, from benchmarks/results/*.json."""

import re
from textwrap import fill
from typing import Any

from evidence import agents, benches, learning, many_groups, ranking, texts
from leaner import depth, memory
from more_evidence import compensation, family_tasks, order, recovery
from page import HERE, heading, load, table, within
from running import busy, campaigns, coverage, engines, families, growth, kills, live, measuring, slider

INTRO = """# Results

Every figure comes from a file in `benchmarks/results`, named above each table, with its command, seed, commit and machine.
This page is written by `python benchmarks/tables.py`. Times were taken on shared, busy cores; read them as upper bounds.
"""


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
            within(found["tau_within"]), within(found["tau_log_ppl_within"]), f"{found['z']:.2f}",
        ]
        for kind, found in result["heldout"].items()
    ]  # fmt: skip
    ratios = " / ".join(f"{100 * float(ratio):.0f}" for ratio in first["tau_within"])
    seconds = ", ".join(f"{name} {value:.0f}" for name, value in result["seconds"].items())
    return "\n".join(
        [
            heading("The demo: `ref-a` on `pydocs`", "demo", record),
            f"Dense perplexity {result['rows'][0]['dense']:.2f} on the test text.",
            f"The whole demo took {result['wall_seconds']:.0f} s.{_from_the_clone()}\n",
            table(["ratio", "predicted", "measured", "uniform policy", "parameters", "file"], rows),
            "\nSeconds by stage: " + seconds + ".\n",
            *_repaid(result),
            f"### The predictors on {first['count']} held-out masks\n",
            "MSE is on the scale PPL_dense / PPL, MAE in nats/token of log-perplexity; tau is Kendall's, of the damage over all",
            f"masks, then among masks of one size ({ratios} %) against measured damage and against measured log-perplexity;",
            "error/std is the root mean square of error over predicted standard deviation.\n",
            table(["predictor", "MSE", "MAE", "tau", "tau within, damage", "tau within, log-perplexity", "error/std"], judged),
        ]
    )


def _from_the_clone() -> str:
    """How long a newcomer waits for the demo's table."""
    record = load("walkthrough")
    if not record:
        return ""
    minutes, machine = record["result"]["clone_to_table_seconds"] / 60, record["machine"]
    words = f"From `git clone` to its table, everything installed anew, it took {minutes:.1f} minutes"
    return f" {words}\n(`benchmarks/results/walkthrough.json`, commit {record['commit'][:8]}, load {machine['load']})."


def _repaid(result: dict[str, Any]) -> list[str]:
    """What choosing cost, in prompt tokens that the smaller models save."""
    rows = [row for row in result["rows"] if "tokens_per_second" in row]
    if not rows:
        return []
    fit = sum(result["seconds"].values())
    found = []
    for row in rows:
        before, after = row["tokens_per_second"]["before"], row["tokens_per_second"]["after"]
        saved = 1 / before - 1 / after
        repaid = f"after {fit / saved / 1e6:.1f} M prompt tokens" if saved > 0 else "never"
        found.append(f"at {100 * row['ratio']:.0f} % {before:,.0f} -> {after:,.0f} tokens/s, repaid {repaid}")
    words = f"The fit took {fit:.0f} s in all and serves every ratio. Prompt speed on this machine, in turns: {'; '.join(found)}."
    return [fill(words, 120) + "\n"]


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
            f"Perplexity on {record['result']['tokens']:,} tokens of text that none was trained on,",
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


GOOD = 0.9
"""Of the speed-up that the removed operations promise."""


def gguf() -> str:
    record = load("gguf")
    result = record["result"]
    rows = [
        [
            f"{row['model']}, {row['quant']}", row["arch"], f"{row['bytes'] / 1e6:.2f} MB",
            f"{row['fallbacks']} of {row['matrices']}", f"{row['ppl_transformers']:.2f}", f"{row['ppl']:.2f}",
            f"{row['logits']:.1e}",
        ]
        for row in result["rows"]
        if "ppl" in row
    ]  # fmt: skip
    header = ["file", "architecture", "size", "finer type", "perplexity, transformers", "llama.cpp", "logits off by"]
    models = {"`ref-a`": result["rows"], **{f"random, {width}": found for width, found in result["stand_ins"].items()}}
    speeds = [_gguf_speed(name, row) for name, found in models.items() for row in found]
    layers = {shape["num_hidden_layers"] for shape in result["shapes"].values()}.pop()
    return "\n".join(
        [
            heading("GGUF files in llama.cpp", "gguf", record),
            f"`ref-a`, dense and with {100 * result['ratio']:.0f} % of the prunable parameters gone, channels in multiples of 1",
            f"and 32; llama-cpp-python {result['llama_cpp_python']}. Perplexity on {result['tokens']:,} test tokens in blocks of",
            f"{result['prompt']}; transformers in float32. Finer type: matrices of a width that blocks do not divide.\n",
            table(header, rows),
            f"\nPrompts of {result['prompt']} tokens, one thread, files in turns, medians of {result['repeats']} (quartiles).",
            f"Random: Llamas of {layers} layers without training, by the width of their stream; that of ref-a is 160. At its",
            "floor: one KV group, or 32 channels, a layer and all else, which shows what of the time attention and FFNs take.",
            "Expected: the removed operations at the price in time that those of the same part have.\n",
            table(["file", "tokens/s", "times as fast as dense", "by removed operations", "reached", "expected"], speeds),
            "\n" + fill(_gguf_why(models), 120),
        ]
    )


def _gguf_speed(name: str, row: dict[str, Any]) -> list[str]:
    found = [f"{name}: {row['model']}, {row['quant']}", _quartiles(row["tokens_per_second"], 0), _quartiles(row["speedup"], 2)]
    if not row["model"].startswith("pruned"):
        return [*found, f"{row['promised']:.2f}", "", ""]
    return [*found, f"{row['promised']:.2f}", f"{_reached(row):.0%}", f"{row['expected']:.2f}"]


def _reached(row: dict[str, Any]) -> float:
    return row["speedup"]["median"] / row["promised"]


def _gguf_why(models: dict[str, list[dict[str, Any]]]) -> str:
    """Where the promise is missed, and what of it each of two reasons explains."""
    pruned = {(name, row["model"], row["quant"]): row for name, rows in models.items() for row in rows if "pruned" in row["model"]}
    missed = [f"{name} {quant} at {model.split(', ')[1]} ({_reached(row):.0%})" for (name, model, quant), row in pruned.items()
              if _reached(row) < GOOD]  # fmt: skip
    dense = [(name, row["quant"], row["parts"]["ffn"]) for name, rows in models.items() for row in rows if row["model"] == "dense"]
    ffn = [f"{name} {quant} {part['operations']:.0%} and {part['time']:.0%}" for name, quant, part in dense]
    odd = [
        pruned[name, "pruned, align 1", quant]["speedup"]["median"] / row["speedup"]["median"]
        for (name, model, quant), row in pruned.items()
        if model == "pruned, align 32"
    ]
    return (
        f"Less than {GOOD:.0%} of the promise: {', '.join(missed) or 'nowhere'}. Two reasons. Widths: at multiples of 1 the files "
        f"have as many operations as at multiples of 32, and {min(odd):.2f} to {max(odd):.2f} times their speed. Prices: an "
        "operation of an FFN takes less time than one of attention, whose scores, rotary embeddings and cache come on top of its "
        "matrices, the more so the narrower the model; and of ref-a it is FFN for the most part that goes. What a model without "
        f"all but 32 channels of its FFNs saves, of all operations and of all time: {', '.join(ffn)}."
    )


def _quartiles(found: dict[str, float], digits: int) -> str:
    return f"{found['median']:,.{digits}f} ({found['low']:,.{digits}f} to {found['high']:,.{digits}f})"


def main() -> None:
    chosen = [*benches(), *texts(), *order(), *ranking(), *learning(), *many_groups(), *agents(), *depth()]
    after = [*compensation(), *recovery(), *families(), *family_tasks()]
    running = [speed(), *live(), *busy(), *slider(), *measuring(), *growth(), *memory(), *engines(), *kills(), *coverage()]
    parts = [INTRO, demo(), *chosen, *after, reference(), gguf(), *running]
    (HERE.parent / "docs" / "results.md").write_text("\n\n".join(parts) + "\n")
    reliability()


def reliability() -> None:
    """Puts the counts of the campaigns into docs/reliability.md, between its marks."""
    page = HERE.parent / "docs" / "reliability.md"
    begin, _, end = re.split(r"(?<=-->\n)(.*?)(?=<!-- end of campaigns)", page.read_text(), maxsplit=1, flags=re.DOTALL)
    page.write_text(f"{begin}\n{campaigns()}\n\n{end}")


if __name__ == "__main__":
    main()
