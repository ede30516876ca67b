"""The plots of docs/results.md, as SVG that depends on the results alone."""

from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from page import HERE

rcParams["svg.hashsalt"] = "ppf"
rcParams["svg.fonttype"] = "none"

SHOWN = {
    "uniform": ("#9a9a9a", "uniform"),
    "owl": ("#c58b2a", "OWL"),
    "alpha_pruning": ("#8a5a9e", "AlphaPruning"),
    "flap_own_order": ("#3f8f6b", "FLAP"),
    "additive": ("#2f6db5", "additive optimum"),
    "dynamic": ("#e0567a", "PPF dynamic"),
    "static": ("#b3123f", "PPF static"),
}
"""Methods in a plot: colour and name."""
LEARNT = {
    "corrected": ("#b3123f", "addition corrected by processes (ours)"),
    "additive": ("#2f6db5", "addition of probes"),
    "cnn": ("#c58b2a", "CNN on the mask matrix"),
    "gradient-boosted trees": ("#3f8f6b", "gradient-boosted trees"),
    "ridge on pairs": ("#8a5a9e", "ridge on pairs"),
    "Gaussian process on keep-ratios": ("#5b5b5b", "Gaussian process on keep-ratios"),
}


def _finish(axes: Any, name: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    folder = HERE.parent / "docs" / "img"
    folder.mkdir(exist_ok=True)
    axes.figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")


def plot_bench(name: str, record: dict[str, Any], searches: dict[str, Any]) -> None:
    """Damage by ratio, on a logarithmic scale, with the intervals over the seeds; a true search, of one seed, as crosses."""
    axes = Figure(figsize=(6.4, 3.8)).add_subplot()
    for method, (colour, label) in SHOWN.items():
        rows = sorted((row for row in record["result"]["rows"] if row["method"] == method), key=lambda row: row["ratio"])
        if not rows:
            continue
        x, y = [100 * row["ratio"] for row in rows], [row["above"] for row in rows]
        axes.plot(x, y, "o-", ms=3, color=colour, label=label, lw=2 if method == "static" else 1.2)
        if all(row["seeds"] for row in rows):
            low, high = zip(*(row["seeds"] for row in rows), strict=True)
            axes.fill_between(x, [max(value, 1e-4) for value in low], high, color=colour, alpha=0.15, lw=0)
    rows = [row for row in searches["result"]["rows"] if row["method"] == "evolution"] if searches else []
    if rows:
        x, y = [100 * row["ratio"] for row in rows], [row["above"] for row in rows]
        axes.plot(x, y, "x", color="black", label=f"evolution on true measurements, seed {searches['result']['seeds'][0]}")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("pruned, % of the prunable parameters")
    axes.set_ylabel("log-perplexity above dense, nats/token")
    axes.set_title(f"{record['result']['model']} on {record['result']['text']}", fontsize=10)
    _finish(axes, name)


def plot_learning(name: str, record: dict[str, Any]) -> None:
    """Mean within-ratio tau by the number of fitted masks."""
    axes, curve = Figure(figsize=(6.4, 3.8)).add_subplot(), record["result"]["curve"]
    counts = [step["fitted"] for step in curve]
    for kind, (colour, label) in LEARNT.items():
        taus = [step["predictors"][kind]["tau_within"].values() for step in curve]
        axes.plot(counts, [sum(tau) / len(tau) for tau in taus], "o-", ms=3, color=colour, label=label)
    axes.set_xscale("log")
    axes.set_xticks(counts, labels=[f"{count:,}" for count in counts])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("masks measured and fitted")
    axes.set_ylabel("Kendall's tau among masks of one size")
    _finish(axes, name)
