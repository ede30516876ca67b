import json
import re
from importlib.resources import files

import numpy as np
import pytest

from learn_builders import LAYOUT
from ppf.report import plots
from ppf.report.facts import Facts

STYLE = files("ppf.report").joinpath("report.css").read_text()


@pytest.fixture(scope="module")
def facts(study):
    return Facts(study.folder)


@pytest.fixture(scope="module")
def every(facts):
    """All plots of a report by name."""
    return {
        "attention": plots.what_stays(facts, "attn"),
        "channels": plots.what_stays(facts, "ffn"),
        "damage": plots.damage(facts)[0],
        "held out": plots.predicted_against_measured(facts.masks("heldout"), facts),
        "learning": plots.learning(facts),
        "sensitivity": plots.sensitivity(facts, "attn"),
        "seconds": plots.seconds(facts.report["seconds"]),
    }


def colours(value):
    """Every name of a colour in a plot."""
    if isinstance(value, str):
        return {value} if value.startswith("--") else set()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return set().union(*map(colours, parts)) if parts else set()


def test_every_plot_is_strict_json(every):
    for figure in every.values():
        assert json.loads(json.dumps(figure, allow_nan=False)) == figure


def test_every_colour_is_in_the_style_of_both_themes(every):
    light, dark = STYLE.split("@media (prefers-color-scheme: dark)")[:2]
    for name in set().union(*map(colours, every.values())):
        for theme in (light, dark):
            assert re.search(rf"{name}: [#r]", theme), name


@pytest.mark.parametrize(("plot", "kind"), [("attention", "attn"), ("channels", "ffn")])
def test_the_map_shows_what_stays(every, facts, plot, kind):
    (trace,) = every[plot]["data"]
    places = [place for place, site in enumerate(LAYOUT.sites) if site.kind == kind]
    kept = facts.kept(facts.shown_ratios)[:, places]
    assert np.array(trace["z"]) == pytest.approx(100 * kept / LAYOUT.units[places], abs=0.06)
    assert trace["customdata"][2][1] == f"{kept[2, 1]} of {LAYOUT.units[places[1]]}"
    assert len(trace["y"]) == len(facts.shown_ratios) and trace["x"] == ["0", "1", "2", "3"]


def test_layers_with_several_sites_of_a_kind_count_them_together(facts):
    total = {layer: sum(site.units for site in LAYOUT.sites if site.layer == layer and site.kind == "ffn") for layer in range(4)}
    assert [cell.split(" of ")[1] for cell in plots.what_stays(facts, "ffn")["data"][0]["customdata"][0]] == [
        str(total[layer]) for layer in range(4)
    ]


def test_measured_points_and_the_line_share_one_scale(facts):
    figure, above = plots.damage(facts)
    shown = {trace["name"]: trace for trace in figure["data"] if trace.get("name")}
    low, high = figure["layout"]["yaxis"]["range"]
    assert low <= 0 < max(shown["predicted: the agent's policies"]["y"]) < high
    heldout = shown["measured: held out"]
    assert heldout["y"] == pytest.approx(facts.masks("heldout").rises, abs=1e-6)
    hidden = sum(value > high for purpose in ("spread", "search", "heldout") for value in facts.masks(purpose).rises)
    assert above == hidden


def test_every_mask_is_in_the_colour_of_its_ratio(every, facts):
    traces = [trace for trace in every["held out"]["data"] if trace["mode"] == "markers"]
    masks = facts.masks("heldout")
    assert sum(len(trace["x"]) for trace in traces) == len(masks.samples)
    for trace in traces:
        low = int(re.match(r"(\d+)–", trace["name"])[1])
        found = dict(zip(np.round(masks.damage, 6).tolist(), masks.ratios.tolist(), strict=True))
        assert all(low <= 100 * found[x] + 1e-6 < low + 10 for x in trace["x"])


def test_stages_that_are_numbered_count_together(every):
    (trace,) = every["seconds"]["data"]
    assert dict(zip(trace["y"], trace["x"], strict=True)) == {"text": 1.0, "search 1 to 2": 5.0, "measuring round": 4.0}


def test_ticks_are_round_and_within():
    assert plots._ticks(0.02, 1.2) == [0.03, 0.1, 0.3, 1.0]
    assert plots._ticks(1e-5, 2) == [1e-5, 1e-4, 1e-3, 0.01, 0.1, 1.0]


def test_a_study_without_such_masks_still_has_its_plots(facts):
    figure = plots.predicted_against_measured(facts.masks("refine"), facts)
    assert len(figure["data"]) == 1 and json.dumps(figure, allow_nan=False)
