"""The report in a real browser, from a file and without a network."""

import re

import pytest

from chromium import chromium
from ppf.config import ReportConfig
from ppf.report import write_report

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as made:
        yield made


@pytest.fixture(scope="module")
def address(study, tmp_path_factory):
    out = tmp_path_factory.mktemp("shown") / "report.html"
    return write_report(ReportConfig(str(study.folder), str(out))).as_uri()


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_drawn_and_nobody_is_asked(browser, address, width, scheme):
    said, asked = [], []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda one: asked.append(one.url) if not one.url.startswith(("data:", "blob:")) else None)
    page.goto(address)
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
    page.wait_for_timeout(500)
    assert page.locator(".js-plotly-plot").count() == page.locator('script[type="application/json"]').count() == 9
    assert page.locator(".js-plotly-plot .xtitle").count() == 9
    assert said == [] and asked == [address]
    assert page.evaluate("document.documentElement.scrollWidth") == width
    letters = page.evaluate("getComputedStyle(document.querySelector('.xtitle')).fill")
    assert (min(map(int, re.findall(r"\d+", letters))) > 150) == (scheme == "dark")
    context.close()


def test_colours_follow_the_theme(browser, address):
    context = browser.new_context(color_scheme="light")
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector(".xtitle")
    letters = "getComputedStyle(document.querySelector('.xtitle')).fill"
    light = page.evaluate(letters)
    page.emulate_media(color_scheme="dark")
    page.wait_for_timeout(800)
    assert page.evaluate(letters) != light
    context.close()
