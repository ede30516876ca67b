"""The plots of a report, in plotly's JSON. A colour that begins with ``--`` is a variable of the page's style sheet."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ppf.report.facts import Facts, Masks
from ppf.space.layout import Site

Figure = dict[str, Any]
KINDS = {"attn": "attention heads (KV groups)", "ffn": "FFN channels", "expert": "channels of the experts"}
"""What people call the units of a kind of site."""
_PURPOSES = {"spread": ("random masks", "--c3"), "search": ("near the agent's policies", "--c2"), "heldout": ("held out", "--c4")}
_RAMP = 7
_MOST_LETTERED = 24


def what_stays(facts: Facts, kind: str) -> Figure:
    """Heat map, a column a layer and a row a ratio: the share of the units that stays."""
    ratios, layout = facts.shown_ratios, facts.layout
    kept = facts.kept(ratios)
    layers = sorted({site.layer for site in layout.sites if site.role == kind})
    columns = [[place for place, site in enumerate(layout.sites) if site.role == kind and site.layer == layer] for layer in layers]
    counts = np.array([kept[:, column].sum(axis=1) for column in columns]).T
    dense = np.array([layout.units[column].sum() for column in columns])
    shares = 100 * counts / dense
    few = dense.max() < 100
    trace = {
        "type": "heatmap",
        "x": [str(layer) for layer in layers],
        "y": [_percent(ratio) for ratio in ratios],
        "z": shares.round(1).tolist(),
        "customdata": [[f"{count} of {of}" for count, of in zip(row, dense, strict=True)] for row in counts],
        "hovertemplate": "layer %{x}, ratio %{y}: %{customdata} stay<extra></extra>",
        "colorscale": [[0, "--heat0"], [0.5, "--heat1"], [1, "--heat2"]],
        "zmin": 0,
        "zmax": 100,
        "xgap": 2,
        "ygap": 2,
        "showscale": False,
    }
    if len(layers) <= _MOST_LETTERED:
        trace |= {"text": (counts if few else shares.round().astype(int)).tolist(), "texttemplate": "%{text}"}
    axes = _axes("layer", "ratio removed", grid=False)
    axes["xaxis"] |= {"type": "category"}
    axes["yaxis"] |= {"type": "category", "autorange": "reversed"}
    return _figure([trace], axes, height=70 + 34 * len(ratios))


def damage(facts: Facts) -> tuple[Figure, int]:
    """Predicted log-perplexity of the agent's policies against the ratio, its spread, and what was measured.

    Returns:
        The plot, and how many measured masks lie above it: some are so bad that the rest would be flat.
    """
    ratios, found = facts.fine
    above, below = found.log_ppl + found.log_ppl_std, np.maximum(found.log_ppl - found.log_ppl_std, 0)
    x = (100 * ratios).round(2).tolist()
    measured, rises = [], [above]
    for purpose, (name, colour) in _PURPOSES.items():
        masks = facts.masks(purpose)
        rises.append(masks.rises)
        marker = {"color": colour, "size": 5, "opacity": 0.55, "symbol": "diamond" if purpose == "heldout" else "circle"}
        points = _points(100 * masks.ratios, masks.rises, f"measured: {name}", marker)
        measured.append(points | {"hovertemplate": "%{x:.1f} % gone: measured %{y:.3f}<extra></extra>"})
    edge = {"type": "scatter", "mode": "lines", "x": x, "line": {"width": 0}, "hoverinfo": "skip", "showlegend": False}
    band = [
        edge | {"y": _round(below)},
        edge | {"y": _round(above), "fill": "tonexty", "fillcolor": "--band", "name": "± 1 std", "showlegend": True},
    ]
    line = {
        "type": "scatter", "mode": "lines", "x": x, "y": _round(found.log_ppl), "name": "predicted: the agent's policies",
        "line": {"color": "--c1", "width": 3}, "customdata": _round(np.exp(facts.dense_log_ppl + found.log_ppl)),
        "hovertemplate": "%{x:.1f} % gone: predicted %{y:.3f}, perplexity %{customdata:.2f}<extra></extra>",
    }  # fmt: skip
    axes = _axes("prunable parameters removed, %", "log-perplexity above dense, nats/token")
    together = np.concatenate(rises)
    top = max(1.05 * float(np.quantile(together, 0.98)), 1.2 * float(above.max()))
    axes["yaxis"]["range"] = [-0.03 * top, top]
    return _figure([*measured, *band, line], axes, height=440), int((together > top).sum())


def predicted_against_measured(masks: Masks, facts: Facts) -> Figure:
    """Scatter of damages, a colour a ratio, on logarithmic axes; on the diagonal they are equal."""
    truth, found = np.maximum(masks.damage, 1e-4), np.maximum(masks.predicted.damage, 1e-4)
    traces = []
    bins = np.minimum((10 * masks.ratios + 1e-9).astype(int), _RAMP - 1)
    for place in sorted(set(bins.tolist())):
        rows = bins == place
        name = f"over {10 * place} %" if place == _RAMP - 1 else f"{10 * place}–{10 * place + 10} %"
        marker = {"color": f"--r{place}", "size": 6, "opacity": 0.75}
        text = [_percent(ratio) for ratio in masks.ratios[rows]]
        traces.append(
            _points(truth[rows], found[rows], name, marker)
            | {"text": text, "hovertemplate": "%{text} gone: measured %{x:.3f}, predicted %{y:.3f}<extra></extra>"}
        )
    ends = [float(min(truth.min(), found.min())) / 1.3, float(max(truth.max(), found.max())) * 1.3] if len(truth) else [0.01, 1]
    diagonal = {
        "type": "scatter", "mode": "lines", "x": ends, "y": ends, "name": "equal", "hoverinfo": "skip",
        "line": {"color": "--muted", "width": 1, "dash": "dash"}, "showlegend": False,
    }  # fmt: skip
    axes = _axes("measured damage, nats/token", "predicted damage, nats/token")
    for axis in axes.values():
        axis |= {"type": "log", "range": np.log10(ends).tolist(), "tickvals": _ticks(*ends)}
    return _figure([diagonal, *traces], axes, height=400, entry=62)


def learning(facts: Facts) -> Figure:
    """The predictor's error on the held-out masks as samples came in, beside that of the sum of single-site damages."""
    x = [known.samples for known in facts.learning]
    ours = {
        "type": "scatter", "mode": "lines+markers", "x": x, "y": _round(np.array([known.mae_damage for known in facts.learning])),
        "customdata": [round(known.tau_mean, 3) for known in facts.learning], "name": "corrected predictor",
        "line": {"color": "--c1", "width": 3}, "marker": {"size": 7},
        "hovertemplate": "%{x} masks: error %{y:.4f}, tau within a ratio %{customdata}<extra></extra>",
    }  # fmt: skip
    sum_alone = facts.report["heldout"]["additive"]["mae_damage"]
    plain = {
        "type": "scatter", "mode": "lines", "x": [x[0], x[-1]], "y": [sum_alone] * 2, "name": "the probes' sum alone",
        "line": {"color": "--c4", "width": 2, "dash": "dot"}, "hovertemplate": "error %{y:.4f}<extra></extra>",
    }  # fmt: skip
    axes = _axes("masks measured besides the probes", "mean error on held-out masks, nats/token")
    axes["xaxis"] |= {"type": "log", "tickvals": _ticks(x[0], x[-1])}
    axes["yaxis"] |= {"rangemode": "tozero"}
    return _figure([ours, plain], axes, height=340)


def sensitivity(facts: Facts, kind: str) -> Figure:
    """Damage of each site alone against the share of it that is gone, a line a site, coloured from the first layer to the last."""
    places = [place for place, site in enumerate(facts.layout.sites) if site.role == kind and facts.probes(place)]
    traces: list[Figure] = []
    for order, place in enumerate(places):
        shares, damages = zip(*facts.probes(place), strict=True)
        colour = f"--r{order * _RAMP // max(len(places), 1)}"
        traces.append({
            "type": "scatter", "mode": "lines+markers", "x": [round(100 * share, 1) for share in shares],
            "y": [max(round(value, 6), 1e-5) for value in damages], "name": _place(facts.layout.sites[place]),
            "line": {"color": colour, "width": 2}, "marker": {"size": 5, "color": colour},
            "hovertemplate": "%{fullData.name}, %{x:.0f} % gone: damage %{y:.4f}<extra></extra>",
        })  # fmt: skip
    axes = _axes("share of the site removed, %", "damage alone, nats/token")
    values = [value for trace in traces for value in trace["y"]] or [1.0]
    axes["yaxis"] |= {"type": "log", "tickvals": _ticks(min(values) / 2, 2 * max(values))}
    for order, trace in enumerate(traces):  # enough to read the colours by
        trace["showlegend"] = order in (0, len(traces) // 2, len(traces) - 1)
    return _figure(traces, axes, height=360)


def _place(site: Site) -> str:
    return f"layer {site.layer}" + (f", {site.kind}" if site.kind != site.role else "")


def seconds(stages: dict[str, float]) -> Figure:
    """Wall time of each stage; the rounds of one kind together."""
    times: dict[str, list[float]] = {}
    for name, value in stages.items():
        times.setdefault(name.rstrip("0123456789").strip(), []).append(value)
    groups = {f"{name} 1 to {len(of)}" if len(of) > 1 else name: sum(of) for name, of in times.items()}
    names = list(groups)[::-1]
    trace = {
        "type": "bar", "orientation": "h", "x": [round(groups[name], 1) for name in names], "y": names,
        "marker": {"color": "--c1"}, "hovertemplate": "%{y}: %{x} s<extra></extra>", "textposition": "auto",
        "text": [f"{groups[name]:.0f} s" for name in names],
    }  # fmt: skip
    axes = _axes("seconds of wall time", "")
    axes["yaxis"] |= {"automargin": True, "showgrid": False, "type": "category"}
    return _figure([trace], axes, height=90 + 26 * len(names))


def _points(x: np.ndarray, y: np.ndarray, name: str, marker: dict[str, Any]) -> Figure:
    return {"type": "scatter", "mode": "markers", "x": _round(x), "y": _round(y), "name": name, "marker": marker}


def _axes(x: str, y: str, grid: bool = True) -> dict[str, dict[str, Any]]:
    def axis(title: str) -> dict[str, Any]:
        return {
            "title": {"text": title, "standoff": 8}, "gridcolor": "--line", "linecolor": "--line", "zerolinecolor": "--line",
            "showgrid": grid, "automargin": True, "fixedrange": True, "exponentformat": "none",
        }  # fmt: skip

    return {"xaxis": axis(x), "yaxis": axis(y)}


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers of a logarithmic axis: two a decade, or one where there are many decades."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    digits = (1, 3) if len(decades) <= 4 else (1,)
    ticks = [round(digit * 10.0**decade, 9) for decade in decades for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def _figure(traces: Sequence[Figure], axes: dict[str, dict[str, Any]], height: int, entry: int = 0) -> Figure:
    """``entry`` is the width of a legend's entry in pixels; 0 leaves each as wide as it is."""
    layout = {
        **axes,
        "height": height,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "--text"},
        "hoverlabel": {"bgcolor": "--card", "font": {"color": "--text"}, "bordercolor": "--line"},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0, "itemwidth": 30, "entrywidth": entry},
    }
    return {"data": list(traces), "layout": layout}


def _round(values: np.ndarray) -> list[float]:
    """Six digits are more than a plot shows, and keep the file small."""
    return np.asarray(values, dtype=float).round(6).tolist()


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.0f} %"
