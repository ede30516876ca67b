"""What a report says, and in which order."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppf import __version__
from ppf.fit_command import command_of
from ppf.provenance import machine, own_name, portable
from ppf.report import plots
from ppf.report.facts import Facts, Table
from ppf.report.page import code, page, plot, section, table, tiles

_VERSIONS = ("python", "torch", "transformers", "numpy", "scipy")


def report_page(facts: Facts, tables: Sequence[Table] = ()) -> str:
    """The HTML of a report.

    Args:
        facts: Of the study.
        tables: Benches to show besides the study's own.
    """
    name, settings = own_name(facts.study.record["model"]["name"] or "a model"), facts.study.record["settings"]
    own = facts.own_table()
    text = own_name(settings["text"])
    lead = f"What stays of {name} at any ratio, what that costs, and how well it was predicted. Fitted on the text {text}."
    sections = [
        tiles(_glance(facts)), _stays(facts), _damage(facts), _predictor(facts), _sensitivity(facts),
        *_methods([*([own] if own else []), *tables]), _costs(facts), _again(facts),
    ]  # fmt: skip
    foot = "Log-perplexity and damage are in nats/token. Damage is the KL divergence of the dense model from the pruned one."
    return page(f"{name}: pruning report", lead, sections, foot)


def _glance(facts: Facts) -> list[tuple[str, str, str]]:
    layout, report, dense = facts.layout, facts.report, facts.study.record["dense"]["test"]
    found = report["heldout"][report["predictor"]]
    low, high = (np.exp(end) for end in dense["interval"])
    tokens, samples = sum(report["tokens"].values()), sum(report["samples"].values())
    return [
        ("parameters", f"{layout.total:,}", f"{100 * layout.prunable / layout.total:.0f} % of them prunable"),
        ("layers", str(layout.layers), f"{layout.model_type}, {len(layout.sites)} sites"),
        ("dense perplexity", f"{np.exp(dense['log_ppl']):.2f}", f"95 % {low:.2f} to {high:.2f}, test text"),
        ("masks measured", f"{samples:,}", f"{report['failed']} failed"),
        ("order within a ratio", f"{found['tau_mean']:.3f}", f"Kendall's tau, {found['count']} held-out masks"),
        ("prediction error", f"{found['mae']:.4f}", "nats/token, the same masks"),
        ("tokens", f"{tokens / 1e6:.2f} M", "run through the model"),
        ("wall time", _duration(sum(report["seconds"].values())), "the whole fit"),
    ]


def _stays(facts: Facts) -> str:
    kinds = list(dict.fromkeys(site.role for site in facts.layout.sites))
    cards = []
    for kind in kinds:
        few = max(site.units for site in facts.layout.sites if site.role == kind) < 100
        caption = f"Numbers are {'how many' if few else 'per cent that'} stay; full colour is all of them."
        cards.append(plot(f"What stays: {plots.KINDS.get(kind, kind)}", caption, plots.what_stays(facts, kind)))
    text = "The agent's policy at several ratios of the prunable parameters: one row a ratio, one column a layer."
    return section("What stays in each layer", text, cards, two=True)


def _damage(facts: Facts) -> str:
    figure, above = plots.damage(facts)
    caption = (
        "Everything here is on the search text. The band is one standard deviation of the prediction. Random masks lie above the "
        "line because nobody chose them well; masks near the agent's policies were measured while it learned."
        + (f" {above} masks are so bad that they lie above the plot." if above else "")
    )
    card = plot("Predicted damage against the ratio", caption, figure)
    return section("What it costs", "How much log-perplexity rises when that share of the prunable parameters goes.", [card])


def _predictor(facts: Facts) -> str:
    heldout, seen = facts.masks("heldout"), facts.masks("spread", "search")
    cards = [
        plot(
            f"Held out: {len(heldout.samples)} unseen masks", "A point is a mask; on the dashed line, prediction and "
            "measurement are equal.", plots.predicted_against_measured(heldout, facts),
        ),
        plot(
            f"Fitted: {len(seen.samples)} masks it learned from", "They lie closer, because the predictor knows them.",
            plots.predicted_against_measured(seen, facts),
        ),
    ]  # fmt: skip
    if facts.learning:
        caption = (
            "Error on the held-out masks had measuring stopped earlier. Curves of single sites and hyperparameters are those of "
            "the whole fit; nothing was fitted again."
        )
        cards.append(plot("Learning curve", caption, plots.learning(facts), "wide"))
    cards.append(_judged(facts))
    text = "The predictor tells the damage of a mask without running the model. What counts is the order of masks of one size."
    return section("How well it predicts", text, cards, two=True)


def _judged(facts: Facts) -> str:
    report = facts.report
    ratios = list(next(iter(report["heldout"].values()))["tau_within"])
    rows = [
        [
            f"{kind}{'*' if kind == report['predictor'] else ''}",
            f"{found['mae']:.4f}",
            f"{found['mse']:.1e}",
            f"{found['tau_mean']:.3f}",
        ]
        + [f"{found['tau_within'][ratio]:.2f}" for ratio in ratios]
        + [f"{found['z']:.2f}"]
        for kind, found in report["heldout"].items()
    ]
    header = ["predictor", "MAE", "MSE", "tau", *(f"{100 * float(ratio):.0f} %" for ratio in ratios), "error/std"]
    caption = "* decides. MAE in nats/token; MSE of PPL dense / PPL; Kendall's tau within a ratio: mean, then at each one."
    return table("All predictors on the held-out masks", caption, header, rows, "wide")


def _sensitivity(facts: Facts) -> str:
    kinds = list(dict.fromkeys(site.role for site in facts.layout.sites))
    caption = "Each point is a measured probe; colours run from the first layer to the last."
    cards = [plot(f"Alone: {plots.KINDS.get(kind, kind)}", caption, plots.sensitivity(facts, kind)) for kind in kinds]
    return section("Sensitivity of each site", "The damage when one site alone shrinks and all others stay whole.", cards, two=True)


def _methods(tables: Sequence[Table]) -> list[str]:
    if not tables:
        return []
    text = "Log-perplexity above dense on test text that no method has seen; tokens are what each ran through the model."
    return [section("Ways to choose what goes", text, [_method_table(found) for found in tables])]


def _method_table(found: Table) -> str:
    ratios = sorted({row["ratio"] for row in found.rows})
    lines: dict[str, list[str]] = {}
    for row in found.rows:
        cost = f"{(row['tokens'] + row['shared_tokens']) / 1e6:.2f} M"
        line = lines.setdefault(row["method"], [row["method"], cost, *[""] * len(ratios)])
        line[2 + ratios.index(row["ratio"])] = f"{row['above']:.4f}{'*' if row['regret'] == 0 else ''}"
    seeds = f"seed {found.seeds[0]}" if len(found.seeds) == 1 else f"mean of seeds {', '.join(map(str, found.seeds))}"
    caption = f"nats/token; * the least at its ratio. {found.tokens:,} tokens of {found.text}; {found.samples} samples; {seeds}."
    header = ["method", "tokens", *(f"{100 * ratio:g} %" for ratio in ratios)]
    return table(f"{found.model} on {found.text}", caption, header, list(lines.values()))


def _costs(facts: Facts) -> str:
    report = facts.report
    tokens = [[name, f"{count:,}"] for name, count in report["tokens"].items()]
    masks = [[purpose, f"{count:,}"] for purpose, count in report["samples"].items()]
    cards = [
        plot("Seconds", f"Measuring took {report['measuring_seconds']:,.0f} s of worker time.", plots.seconds(report["seconds"])),
        table(
            "Tokens and masks", "Tokens run through the model, by purpose; then masks, by purpose.", ["of", "count"],
            [*tokens, ["all tokens", f"{sum(report['tokens'].values()):,}"], *masks],
        ),
    ]  # fmt: skip
    return section("What the fit took", "Once for a model; every ratio after that is milliseconds.", cards, two=True)


def _again(facts: Facts) -> str:
    record, report = facts.study.record, facts.report
    made, here = report.get("made") or {}, machine()
    of_fit = made.get("machine") or {}
    rows = [
        ["model", f"{own_name(record['model']['name'] or 'an object')} (digest {record['model']['digest']})"],
        ["text", f"{own_name(record['settings']['text'])} (token blocks, sha256 {facts.text_digest})"],
        ["blocks", f"{record['seq_len']} tokens, {record['dtype']}"],
        ["seed", str(record["settings"]["seed"])],
        ["importance", str(report["importance"]["method"])],
        ["context", f"{record['context']} (hash of model, text and precision)"],
        ["fitted with", _versions(made.get("version"), of_fit) if made else "not recorded"],
        ["commit", str(made.get("commit") or "not recorded")],
        ["this report", _versions(__version__, here)],
    ]
    command = command_of(record["settings"], portable)
    text = "The same command, on the same model and text, gives the same masks; times differ."
    cards = [
        code("Command", command, "Settings that are not named are the defaults."),
        table("Facts", "Digests tell whether two studies saw the same.", ["what", "value"], rows, "words"),
    ]
    return section("How to make it again", text, cards)


def _versions(own: Any, others: dict[str, Any]) -> str:
    return ", ".join([f"ppf {own}", *(f"{name} {others[name]}" for name in _VERSIONS if name in others)])


def _duration(value: float) -> str:
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
