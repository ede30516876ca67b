"""How the command line lays out its answers."""

import json
import shlex
import sys
from typing import Any

from ppf.config import Target
from ppf.space.layout import role_of

_DISHONEST = 3.0
"""Standard deviations that a predictor may be off on held-out masks before a user is told."""


def print_gguf(record: dict[str, Any] | None, quiet: bool) -> None:
    """What there is to say of a GGUF file; with ``quiet``, or without a file, only what the user must know."""
    for note in record["notes"] if record else ():
        print(f"warning: {note}", file=sys.stderr)
    if record is None or quiet:
        return
    check = record["check"]
    finer = (
        f"; {check['fallbacks']} of {check['matrices']} matrices are of a finer type, for blocks do not divide their width"
        if check["fallbacks"]
        else ""
    )
    lines = {
        "GGUF": f"{record['out']}, {human_size(record['bytes'])}, architecture {record['arch']}, {record['quant']}{finer}",
        "tokenizer": record["tokenizer"],
        "checked": record["checked"],
    }
    for name, value in lines.items():
        print(f"{name:<11} {value}")


def print_planned(record: dict[str, Any], quiet: bool) -> None:
    """What a plan made of a model; with ``quiet`` strict JSON."""
    source = record["from"]
    if source["kind"] == "export" and not source["same_model"]:
        print("warning: the plan was made for another model of this layout; its mask is applied as it is", file=sys.stderr)
    if source.get("compensated") and record["compensation"]["method"] == "none":
        print("warning: the plan's export was compensated, and this one is not; add --compensate and --text", file=sys.stderr)
    if quiet:
        print_json(record)
    else:
        before, after = record["params"]["before"], record["params"]["after"]
        asked = f"asked {record['ratio']['asked']:.4f}, met " if "asked" in record["ratio"] else ""  # a mask asks for itself
        lines = {
            "ratio": f"{asked}{record['ratio']['met']:.4f} of the prunable parameters",
            "parameters": f"{before:,} -> {after:,}  ({100 * (1 - after / before):.1f} % of all gone)",
            **_whole(record),
            "weights": f"{human_size(record['bytes']['before'])} -> {human_size(record['bytes']['after'])}",
            "perplexity": "not measured; name a --text",
            "written to": f"{record['out']}  ({record['checked']})",
        }
        if measured := record.get("measured"):
            low, high = measured["interval"]
            found = f"measured {measured['ppl']:.2f} (95 % {low:.2f} to {high:.2f}), dense {record['dense']['ppl']:.2f}"
            lines["perplexity"] = f"{found}; {record['protocol']['text']}, {record['protocol']['tokens']:,} tokens"
            lines |= _lost(record)
        for name, value in lines.items():
            print(f"{name:<11} {value}")
    print_gguf(record["gguf"], quiet)


def print_policy(record: dict[str, Any]) -> None:
    """What a decision keeps at each layer, and what it should cost."""
    ratio, predicted, params = record["ratio"], record["predicted"], record["params"]
    cells: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for entry in record["kept"]:  # the experts of a layer share a cell
        cells.setdefault((entry["layer"], role_of(entry["kind"])), []).append(entry)
    kinds, layers = list(dict.fromkeys(kind for _, kind in cells)), sorted({layer for layer, _ in cells})
    rows = [[str(layer), *(_kept(cells.get((layer, kind), [])) for kind in kinds)] for layer in layers]
    print_table("what stays", ["layer", *kinds], rows)
    for name, value in _whole(record).items():
        print(f"{name:<11} {value}")
    print(f"ratio       asked {ratio['asked']:.4f}, met {ratio['met']:.4f}")
    print(f"perplexity  predicted {predicted['ppl']:.2f}  ({predicted['log_ppl']:.4f} +- {predicted['std']:.4f} nats/token)")
    gone = 100 * (1 - params["after"] / params["before"])
    print(f"parameters  {params['before']:,} -> {params['after']:,}  ({gone:.1f} % of all gone)")
    if told := _rounding(record):
        print(f"rounding    {told}")
    print(f"decided in  {record['milliseconds']:.1f} ms")


def _rounding(record: dict[str, Any]) -> str:
    """What keeping widths in steps costs by prediction; nothing without steps."""
    if not (found := record["rounding"]):
        return ""
    steps = " ".join(f"--{name} {found[name]}" for name in ("align", "tp") if found[name] > 1)
    return f"with {steps} predicted {found['ppl']:.2f}, without {found['unrounded_ppl']:.2f}"


def _whole(record: dict[str, Any]) -> dict[str, str]:
    """A line on the layers, sub-layers and experts that are gone as a whole; none where none is."""
    gone = [entry for entry in record["kept"] if not entry["kept"]]
    if not gone:
        return {}
    left = {entry["layer"] for entry in record["kept"] if entry["kept"]}
    layers = len({entry["layer"] for entry in gone} - left)
    alone = [entry["kind"].rstrip("0123456789") for entry in gone if entry["layer"] in left]
    words = {"attn": "attentions alone", "ffn": "FFNs alone", "expert": "experts"}
    parts = (layers, "whole layers"), *((alone.count(kind), what) for kind, what in words.items())
    told = {"gone whole": ", ".join(f"{what} {count}" for count, what in parts if count)}
    if "attn" in alone:
        told["vLLM"] = "loads no layer without attention; use transformers or llama.cpp"
    return told


def _kept(entries: list[dict[str, Any]]) -> str:
    """What stays of the sites that share a cell, from the least to the most."""
    if not entries:
        return ""
    low, high = (pick(entry["kept"] for entry in entries) for pick in (min, max))
    return f"{low} of {entries[0]['of']}" if low == high else f"{low} to {high} of {entries[0]['of']}"


def print_json(record: dict[str, Any]) -> None:
    """Strict JSON on one line; a NaN would be none."""
    print(json.dumps(record, allow_nan=False))


def warn_range(record: dict[str, Any]) -> None:
    """Says that a ratio lies beyond what the agent knows."""
    if not record["in_range"]:
        asked = record["ratio"]["asked"]
        print(f"warning: ratio {asked:.3g} is beyond what the agent was trained on; judge by measuring", file=sys.stderr)


def warn_missed(missed_by: float) -> None:
    """A predictor that is far off its own standard deviation promises too much."""
    if missed_by > _DISHONEST:
        what = f"the predictor missed held-out masks by {missed_by:.1f} of its standard deviations"
        print(f"warning: {what}, by which its +- is widened; judge by measuring, or fit with more --samples", file=sys.stderr)


def warn_nothing(target: Target, record: dict[str, Any]) -> None:
    """Says that a wanted size is that of the dense model or more."""
    if target.ratio is None and record["ratio"]["asked"] == 0:
        print("warning: nothing is removed; the model is that small already", file=sys.stderr)


def print_pruned(record: dict[str, Any]) -> None:
    """What was cut, what it was measured to cost, and where it lies."""
    before, after = record["params"]["before"], record["params"]["after"]
    without = "" if record["compensation"]["method"] == "none" else " without compensation"
    lines = {
        "ratio": f"asked {record['ratio']['asked']:.4f}, met {record['ratio']['met']:.4f} of the prunable parameters",
        "parameters": f"{before:,} -> {after:,}  ({100 * (1 - after / before):.1f} % of all gone)",
        **_whole(record),
        "weights": f"{human_size(record['bytes']['before'])} -> {human_size(record['bytes']['after'])}",
        "perplexity": f"predicted {record['predicted']['ppl']:.2f}{without}, {_found(record)}, dense {record['dense']['ppl']:.2f}",
    }
    lines |= _lost(record)
    if told := _rounding(record):
        lines["rounding"] = told
    protocol = record["protocol"]
    lines["protocol"] = f"{protocol['text']}, {protocol['tokens']:,} tokens in blocks of {protocol['seq_len']}, {protocol['dtype']}"
    if speed := record.get("tokens_per_second"):
        lines["tokens/s"] = f"{speed['before']:,.0f} -> {speed['after']:,.0f}  (prompt, this machine)"
    lines["written to"] = f"{record['out']}  ({record['checked']})"
    for name, value in lines.items():
        print(f"{name:<11} {value}")


def _lost(record: dict[str, Any]) -> dict[str, str]:
    """A line on what was lost against the dense model, told block by block, if that was measured."""
    lost = record.get("measured", {}).get("above_dense")
    if lost is None:
        return {}
    low, high = lost["interval"]
    return {"above dense": f"{lost['log_ppl']:.4f} nats/token (95 % {low:.4f} to {high:.4f}, block against block)"}


def _found(record: dict[str, Any]) -> str:
    """The measured perplexity, if there is one."""
    if "measured" not in record:
        return "not measured"
    low, high = record["measured"]["interval"]
    return f"measured {record['measured']['ppl']:.2f} (95 % {low:.2f} to {high:.2f})"


def print_recovered(record: dict[str, Any]) -> None:
    """Figures before and after training."""
    found = {"teacher" if name == "dense" else name: record[name] for name in ("dense", "before", "after") if record[name]}
    protocol, teacher = record["protocol"], record["teacher"]
    print_table(
        "before and after",
        ["model", "perplexity", "95 %", "nats/token"],
        [
            [name, f"{one['ppl']:.2f}", f"{one['interval'][0]:.2f} to {one['interval'][1]:.2f}", f"{one['log_ppl']:.4f}"]
            for name, one in found.items()
        ],
    )
    low, high = record["gain"]["interval"]
    share = "" if record["share"] is None else f", {100 * record['share']:.0f} % of the damage"
    method = "all weights" if record["rank"] is None else f"LoRA of rank {record['rank']}"
    lines = {
        "gain": f"{record['gain']['log_ppl']:.4f} nats/token (95 % {low:.4f} to {high:.4f}){share}",
        "protocol": f"{protocol['text']}, {protocol['tokens']:,} tokens in blocks of {protocol['seq_len']}, {protocol['dtype']}",
        "training": f"{method}, {record['tokens']:,} tokens, drawn from {record['distinct_tokens']:,} of {record['text']}, "
        f"{record['steps']} steps, rate {record['lr']:.2g}, {record['seconds']:.0f} s",
        "learnt from": "the text alone" if teacher is None else teacher["name"] or "the given model",
        "weights": f"{record['params']:,} parameters, {human_size(record['bytes'])}",
        "written to": f"{record['out']}  (reloaded and checked)",
    }
    for name, value in lines.items():
        print(f"{name:<11} {value}")
    if record["dense"] and record["dense"]["log_ppl"] > record["before"]["log_ppl"]:
        print("warning: the teacher was worse than the model on this text before it learnt", file=sys.stderr)
    elif high < 0:
        print("warning: training made the model worse on this text; lower --lr or train on more tokens", file=sys.stderr)
    elif low <= 0:
        print("warning: no gain can be told on this text; train on more tokens, or keep the old folder", file=sys.stderr)


def print_evaluated(record: dict[str, Any]) -> None:
    """A perplexity and how it was measured."""
    low, high = record["interval"]
    print(f"perplexity {record['ppl']:.4f}  (95 % {low:.4f} to {high:.4f}), {record['log_ppl']:.6f} nats/token")
    print(", ".join(f"{name} {value}" for name, value in record["protocol"].items()))


def print_families(record: dict[str, Any]) -> None:
    """What works for each model family."""
    rows = [
        [
            one["family"],
            ", ".join(one["units"]),
            ", ".join(one["depth"]),
            " / ".join(one["gguf"] or "-"),
            "yes" if one["vllm"] else "-",
        ]
        for one in record["families"]
    ]
    print_table("model families", ["family", "units", "depth", "GGUF", "vLLM"], rows)
    print("depth: what can go as a whole, the attention of the first layer excepted (ppf fit --depth).")
    print("GGUF: llama.cpp's architecture for layers alike / that differ; the same one, or a qwen3 that is not tied: padded.")
    print("vLLM: the folder has what its Transformers backend asks for; it was not run with vLLM (tools/check_vllm.py does).")


def print_repaired(record: dict[str, Any]) -> None:
    """What was set aside, and what is left."""
    for one in record["aside"]:
        print(f"{one['file']:<24} {one['why']}; set aside as {one['to']}")
    print(f"{record['samples']:,} samples are whole")
    if not record["aside"] and record["fit"] is None:
        print("nothing is damaged")
        return
    print("next     " + (record["fit"] or "the fit of the study as it was, which no file tells any more"))
    unsure = record["fit"] and not record["sure"]
    print("         It makes what is missing from the samples.", end=" " if unsure else "\n")
    if unsure:
        print("No checksum vouches for it: compare it with the one that you gave.")


def print_report(report: dict[str, Any], study: str) -> None:
    """How well a fit's predictors did, and what it spent."""
    first = next(iter(report["heldout"].values()))
    ratios = " / ".join(f"{100 * float(ratio):.0f}" for ratio in first["tau_within"])
    rows = []
    for kind, found in report["heldout"].items():
        within = " / ".join(f"{value:.2f}" for value in found["tau_within"].values())
        used = "*" if kind == report["predictor"] else ""
        rows.append([kind + used, f"{found['mse']:.2e}", f"{found['mae']:.4f}", f"{found['tau']:.2f}", within, f"{found['z']:.2f}"])
    print_table(
        f"predictors on {first['count']} held-out masks",
        ["predictor", "MSE", "MAE", "tau", f"tau within {ratios} %", "error/std"],
        rows,
    )
    print("* decides. MSE of PPL_dense/PPL, MAE in nats/token, Kendall's tau of the damage: of all, and within a ratio.")
    samples = ", ".join(f"{count} {purpose}" for purpose, count in report["samples"].items())
    tokens = sum(report["tokens"].values())
    lost = f"; {report['damaged']} damaged rows left out" if report["damaged"] else ""
    print(f"samples  {samples}; {report['failed']} failed{lost}; {tokens:,} tokens through the model")
    print("seconds  " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in report["seconds"].items()))
    print(f"next     ppf prune {shlex.quote(study)} --ratio 0.3 --out smaller")


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table as wide as it needs to be, so that a file or a pipe gets whole rows."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, name in enumerate(header):
        table.add_column(name, justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False)
    wide = Console(highlight=False, width=160)
    (console if console.is_terminal and console.width >= 100 else wide).print(table)


def human_size(count: int) -> str:
    """Bytes in the largest decimal unit that fits."""
    unit, name = next(pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if count >= pair[0] or pair[1] == "kB")
    return f"{count / unit:.2f} {name}"
