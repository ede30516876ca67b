import re
from importlib import util

import pytest

from builders import refuses
from ppf.errors import ResourceError
from ppf.report import page as module
from ppf.report.page import code, page, plot, section, table, tiles

NASTY = "</script><img src=x onerror=alert(1)> & \"quotes\" 'single'"
FIGURE = {"data": [{"name": NASTY}], "layout": {"height": 300}}


def test_what_is_given_is_text():
    parts = [
        tiles([(NASTY, NASTY, NASTY)]), section(NASTY, NASTY, []), plot(NASTY, NASTY, FIGURE),
        table(NASTY, NASTY, [NASTY], [[NASTY]]), code(NASTY, NASTY, NASTY),
    ]  # fmt: skip
    for part in parts:
        assert "<img" not in part and "alert(1)" in part
        assert part.count("</script>") == (1 if "application/json" in part else 0)


def test_a_plot_says_what_it_is_and_keeps_its_place():
    made = plot("title", "caption", FIGURE)
    assert 'role="img" aria-label="title" style="height:300px"' in made and "<figcaption>caption</figcaption>" in made


def test_a_cell_with_a_star_stands_out():
    made = table("t", "c", ["a", "b"], [["x", "1.0*"], ["y", "2.0"]])
    assert "<td><b>1.0*</b></td>" in made and "<td>2.0</td>" in made and made.count('scope="col"') == 2


def test_the_file_needs_nothing_else(monkeypatch):
    monkeypatch.setattr(module, "plotly_bundle", lambda: "/* bundle */")
    made = page("title", "lead", [section("s", "t", [plot("p", "c", {**FIGURE, "data": []})])], "foot")
    assert re.findall(r"""(?:src|href)\s*=|url\(|@import|https?:""", made) == []
    assert "default-src 'none'" in made and made.startswith("<!doctype html>") and made.rstrip().endswith("</html>")
    assert 'name="viewport"' in made and "prefers-color-scheme: dark" in made


def test_the_bundle_is_plotlys_own_and_ends_no_script_early():
    bundle = module.plotly_bundle()
    assert "plotly.js v" in bundle[:400] and len(bundle) > 1e6
    assert "</script" not in bundle.lower()


def test_without_plotly_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert util.find_spec("plotly")
    with refuses(ResourceError) as caught:
        module.plotly_bundle()
    assert "ppf[report]" in str(caught.value)


@pytest.mark.parametrize("value", ["", "plain"])
def test_plain_text_stays_as_it_is(value):
    assert f"<dd>{value}<small>" in tiles([("n", value, "")])
