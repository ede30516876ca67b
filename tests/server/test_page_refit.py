"""The page while what is served changes: a study fitted anew, a ratio that another client set."""

import shutil

import pytest

from http_client import request, strict
from ppf.config import Target
from ppf.decide import Decider
from ppf.server import refit
from ppf.study import StudyFolder
from server_runs import fit_anew, running
from slider_moves import move

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api")
from page_views import heights, ready, tiles, told  # noqa: E402  # it needs playwright


@pytest.fixture
def own(study, tmp_path, monkeypatch):
    """A copy of the study, to be fitted anew; servers look often."""
    monkeypatch.setattr(refit, "_LOOK_SECONDS", 0.05)
    return StudyFolder(shutil.copytree(study, tmp_path / "own"))


def shows(page, own, ratio):
    """Whether bars and numbers are those that the library decides."""
    decision = Decider(own.folder).decide(Target(ratio=ratio))
    sites = sorted(zip(own.layout.sites, decision.allocation.kept, strict=True), key=lambda pair: pair[0].kind)
    bars = [100 * kept / site.units for site, kept in sites]
    assert [float(height.rstrip("%")) for height in heights(page)] == pytest.approx(bars, abs=0.01)
    assert tiles(page)["parameters"] == f"{decision.params[1]:,}"


@pytest.mark.parametrize("with_model", [True, False])
def test_a_page_that_is_open_follows_a_study_that_is_fitted_anew(visit, own, with_model):
    with running(own.folder, no_model=not with_model) as (port, _):
        page = ready(visit(port))
        page.wait_for_selector("body[data-ready=all]")
        move(page, 0.4)
        shows(page, own, 0.4)
        assert not page.is_visible("#news")
        line = page.get_attribute("#chart .line", "d")
        fit_anew(own, 0.8, most=0.5)
        told(page, "#news", "fitted anew")
        page.wait_for_selector("body[data-ready=all]")
        assert (page.input_value("#ratio"), page.get_attribute("#ratio", "max")) == ("0.4", "0.5")
        shows(page, own, 0.4)
        assert "tau 0.50" in page.inner_text("#chart-lead") and page.get_attribute("#chart .line", "d") != line
        move(page, 0.2)
        shows(page, own, 0.2)
        move(page, 0.5)
        fit_anew(own, 0.2, most=0.3)
        sync_api.expect(page.locator("#ratio")).to_have_attribute("max", "0.3", timeout=20_000)
        page.wait_for_selector("body[data-ready=all]")
        assert page.input_value("#ratio") == "0.3" and page.inner_text("#ratio-shown") == "30.0 %"
        shows(page, own, 0.3)
        page.close()  # before the server, which it would miss


def test_an_answer_of_another_fit_is_enough_to_follow(visit, own):
    with running(own.folder, no_model=True) as (port, _):
        page = ready(visit(port))
        page.wait_for_selector("body[data-ready=all]")
        page.route("**/api/state", lambda route: None)  # asked, and never answered
        fit_anew(own, 0.8)
        while strict(request(port, "GET", "/api/state")[2])["fits"] != 2:
            page.wait_for_timeout(20)
        page.evaluate("document.getElementById('ratio').step = '0.0001'")
        move(page, 0.4021)
        shows(page, own, 0.4021)
        assert page.is_visible("#news")
        page.close()


def test_the_slider_reaches_where_another_client_sets_the_model(visit, own):
    with running(own.folder) as (port, _):
        page = ready(visit(port))
        request(port, "POST", "/api/ratio", b'{"ratio": 0.7}')
        sync_api.expect(page.locator("#ratio")).not_to_have_attribute("max", "0.6", timeout=20_000)
        move(page, 0.7)
        assert page.is_visible("#beyond")
        page.close()
