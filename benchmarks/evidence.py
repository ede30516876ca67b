"""The sections of docs/results.md on who chooses best, and their plots in docs/img."""

from typing import Any

from page import load, section, spread, table, within
from plots import plot_bench, plot_learning
from ppf.learn.baselines import HEURISTICS
from ppf.recipes.bench import OWN_ORDER

MODELS = ("ref-a", "ref-q", "stories260K")
LEAST_SEEDS = 3
BOLD = """Bold: the least, and what cannot be told from it: the 95 % interval of the difference on the same blocks holds 0, over
    the seeds where there are three or more, else over the blocks."""


SEARCHES = {
    "searches": "True searches, one ratio at a time",
    "long": "How much room is left: a long true search",
    "longest": "How much room is left: fifty times the tokens of a fit, for one ratio",
}
"""By the beginning of a results file's name."""


def benches() -> list[str]:
    """Methods on each model: those that serve all seeds, then the true searches."""
    parts = []
    for model in MODELS:
        record = load(f"bench-{model}")
        if record:
            parts.append(_bench(f"bench-{model}", record))
            plot_bench(f"bench-{model}", record, load(f"searches-{model}"))
        for name, title in SEARCHES.items():
            if record := load(f"{name}-{model}"):
                parts.append(_searches(f"{name}-{model}", title, record))
    return parts


def _cells(record: dict[str, Any]) -> tuple[list[float], dict[str, dict[float, dict[str, Any]]]]:
    """The ratios, and per method its row at each."""
    methods: dict[str, dict[float, dict[str, Any]]] = {}
    for row in record["result"]["rows"]:
        methods.setdefault(row["method"], {})[row["ratio"]] = row
    return sorted({row["ratio"] for row in record["result"]["rows"]}), methods


def _bench(name: str, record: dict[str, Any]) -> str:
    result, (ratios, methods) = record["result"], _cells(record)
    rows = [[method, _cost(found), *(_cell(found[ratio]) for ratio in ratios)] for method, found in methods.items()]
    against = {
        label: [min(methods[method][ratio]["above"] for method in names if method in methods) for ratio in ratios]
        for label, names in {"the best heuristic": (*HEURISTICS, *OWN_ORDER), "addition": ("additive",)}.items()
    }
    static = [methods["static"][ratio]["above"] for ratio in ratios]
    lines = [
        f"Against {label} static pruning does less damage by "
        + ", ".join(f"{100 * (1 - ours / theirs):.0f} %" for ours, theirs in zip(static, others, strict=True))
        + f" at {_percents(ratios)}."
        for label, others in against.items()
    ]
    seeds, ppl = len(result["seeds"]), result["dense_ppl"]
    words = f"""Log-perplexity above dense, nats/token, on {result["test_tokens"]:,} test tokens (dense perplexity
        {spread(ppl, 2)}); mean of {seeds} fit{"s" if seeds > 1 else ""} of {result["samples"]} masks of
        {result["search_tokens"]:,} tokens, +- the half-width of its 95 % interval over three seeds or more. Tokens: run through the
        model for one ratio, what serves all ratios included. {BOLD}"""
    header = ["method", "tokens", *(f"{100 * ratio:.0f} %" for ratio in ratios)]
    title, plot = f"Ways to choose: `{result['model']}` on {result['text']}", f"![Damage by ratio](img/{name}.svg)"
    return section(title, name, record, words, table(header, rows), "\n".join(lines), plot)


def _percents(ratios: list[float]) -> str:
    return " / ".join(f"{100 * ratio:.0f}" for ratio in ratios) + " %"


def _cost(found: dict[float, dict[str, Any]]) -> str:
    return f"{max(row['tokens'] + row['shared_tokens'] for row in found.values()) / 1e6:.2f} M"


def _cell(row: dict[str, Any]) -> str:
    """Bold where nothing is better, or where the interval of what it lies behind the best holds 0."""
    value, several = f"{row['above']:.4f}", row["runs"] >= LEAST_SEEDS
    if several:
        value += f" +- {(row['seeds'][1] - row['seeds'][0]) / 2:.4f}"
    behind = row.get("behind")
    told_apart = row["regret"] > 0 and not (behind and behind["seeds" if several else "blocks"][0] <= 0)
    return value if told_apart else f"**{value}**"


def _searches(name: str, title: str, record: dict[str, Any]) -> str:
    result, (ratios, methods) = record["result"], _cells(record)
    rows = [[method, _cost(found), *(_paired(found.get(ratio)) for ratio in ratios)] for method, found in methods.items()]
    again = min(row["tokens"] for row in methods["static"].values()) / 1e6
    words = f"""One seed ({result["seeds"][0]}). A true search spends its tokens again at every ratio; static pruning spends
        {again:.2f} M again, and the rest serves all. In brackets by how much a method is worse than static pruning on the same
        blocks, 95 % interval over blocks."""
    header = ["method", "tokens", *(f"{100 * ratio:.0f} %" for ratio in ratios)]
    return section(f"{title}: `{result['model']}`", name, record, words, table(header, rows))


def _paired(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    if row["method"] == "static" or "worse" not in row:
        return f"{row['above']:.4f}"
    low, high = row["worse"]["blocks"]
    return f"{row['above']:.4f} ({low:+.3f} to {high:+.3f})"


def texts() -> list[str]:
    """Policies on texts that they were not chosen on."""
    parts = []
    for model in MODELS:
        if record := load(f"texts-{model}"):
            result, rows = record["result"], []
            ratios = sorted({row["ratio"] for row in next(iter(result["texts"].values()))})
            for text, found in result["texts"].items():
                for method in dict.fromkeys(row["method"] for row in found):
                    cells = {row["ratio"]: row for row in found if row["method"] == method}
                    rows.append([text, method, *(_cell(cells[ratio]) for ratio in ratios)])
            words = f"""The same policies, log-perplexity above dense on {result["tokens"]:,} tokens of texts that were never
                searched on, +- the half-width of the 95 % interval over the seeds. {BOLD}"""
            header = ["text", "method", *(f"{100 * ratio:.0f} %" for ratio in ratios)]
            title = f"On other texts: `{model}`, chosen on {result['searched']}"
            parts.append(section(title, f"texts-{model}", record, words, table(header, rows)))
    return parts


def ranking() -> list[str]:
    """Who ranks masks of one size best, by which truth."""
    parts = []
    for model in MODELS:
        if record := load(f"ranking-{model}"):
            result = record["result"]
            truths = list(next(iter(result["judges"].values()))["tau_within"])
            ratios = _percents([float(ratio) for ratio in next(iter(result["judges"].values()))["tau_within"][truths[0]]])
            rows = [
                [judge, f"{found['tokens']:,}", *(within(found["tau_within"].get(truth, {})) or "-" for truth in truths)]
                for judge, found in result["judges"].items()
            ]
            seconds, token = result["seconds"]["prediction"], result["seconds"]["token_measured"]
            words = f"""Kendall's tau among masks of one size ({ratios}), {result["masks"]} held-out masks around the agent's
                policies, {result["fitted"]} fitted. Columns: by whose damage they are ranked; texts other than `search` were
                not measured to fit. A prediction takes {1e3 * seconds:.2f} ms, a true measurement of 4,096 tokens
                {4096 * token:.2f} s on one thread."""
            title = f"Predictor or a short true measurement: `{model}`"
            parts.append(section(title, f"ranking-{model}", record, words, table(["judge", "tokens a mask", *truths], rows)))
    return parts


def learning() -> list[str]:
    """Predictors by the number of masks."""
    parts = []
    for model in MODELS:
        if record := load(f"learning-{model}"):
            result = record["result"]
            plot_learning(f"learning-{model}", record)
            kinds = list(result["curve"][0]["predictors"])
            rows = [[kind, *(_learnt(step["predictors"][kind]) for step in result["curve"])] for kind in kinds]
            words = f"""All are judged on the {result["heldout"]} held-out masks of the largest study: mean over
                {_percents(result["ratios"])} of Kendall's tau within a ratio, and in brackets the mean squared error on the
                scale PPL_dense / PPL."""
            figures = table(["predictor", *(f"{step['fitted']} masks" for step in result["curve"])], rows)
            plot = f"![Tau by masks](img/learning-{model}.svg)"
            title = f"How many masks a predictor needs: `{model}`"
            parts.append(section(title, f"learning-{model}", record, words, figures, plot))
    return parts


def _learnt(found: dict[str, Any]) -> str:
    taus = found["tau_within"].values()
    return f"{sum(taus) / len(taus):.2f} ({found['mse']:.1e})"


def many_groups() -> list[str]:
    """Predictors on layers of many KV groups."""
    record = load("many_groups")
    if not record:
        return []
    result = record["result"]
    first = next(iter(result["heldout"].values()))
    rows = [
        [kind, f"{found['mse']:.1e}", f"{found['tau']:.3f}", within(found["tau_within"]), f"{found['z']:.2f}"]
        for kind, found in result["heldout"].items()
    ]
    words = f"""A Llama of {result["num_hidden_layers"]} layers with {result["groups"]} KV groups each, {result["hidden_size"]}
        wide, with random weights: what its damages are means nothing, only whether they can be predicted. {first["count"]} held-out
        masks, of which none was fitted, {sum(result["samples"].values())} masks in all; the figures as in the demo above."""
    header = ["predictor", "MSE", "tau", "tau within a ratio, damage", "error/std"]
    return [section("Many KV groups in a layer: a random model", "many_groups", record, words, table(header, rows))]


def agents() -> list[str]:
    """Learners for the agent."""
    record = load("agents")
    if not record:
        return []
    result = record["result"]
    columns = ("mean_gain", "worst_gain", "shortfall", "worst_shortfall", "gain_up_to_part", "gain_beyond_part")
    rows = [
        [name, *(spread(found[column], 4) for column in columns), spread(found["questions"], 0), spread(found["seconds"], 0)]
        for name, found in result["learners"].items()
    ]
    part = f"{100 * result['part']:.0f} %"
    header = ["learner", "mean gain", "worst ratio", "shortfall", "worst", f"gain up to {part}", "beyond", "questions", "seconds"]
    words = f"""Each learner may ask the predictor {result["questions"]:,} times, and begins with the additive optimum. Gain:
        log(damage of the start / damage of the policy) under the predictor's objective, over {result["ratios"]} ratios that
        none was trained on; 0 is the start. Shortfall: what searching each of these ratios alone gains beyond that. Means over
        the seeds, with the least and the most in brackets."""
    return [section("Which learner for the agent", "agents", record, words, table(header, rows))]
