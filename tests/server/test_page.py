"""The page in a real browser: Chromium, and no network but the server."""

import re

import pytest

from server_runs import running
from slider_moves import move

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api")
from page_views import heights, ready, tiles, told  # noqa: E402  # it needs playwright


def test_the_slider_moves_bars_numbers_and_marker(visit, decisions):
    page = ready(visit(decisions))
    move(page, 0.1)
    before, bars, at = tiles(page), heights(page), page.get_attribute("#chart svg g", "transform")
    move(page, 0.5)
    after = tiles(page)
    assert page.inner_text("#ratio-shown") == "50.0 %"
    for name in ("predicted perplexity", "parameters", "file size", "memory"):
        assert float(re.sub(r"[^\d.]", "", after[name])) != float(re.sub(r"[^\d.]", "", before[name])), name
    assert int(after["parameters"].replace(",", "")) < int(before["parameters"].replace(",", ""))
    assert heights(page) != bars and page.get_attribute("#chart svg g", "transform") != at


def test_what_is_shown_is_what_the_server_decides(visit, decisions):
    page = ready(visit(decisions))
    move(page, 0.25)
    record = page.evaluate("async () => (await fetch('/api/policy?ratio=0.25')).json()")
    assert tiles(page)["parameters"] == f"{record['params']['after']:,}"
    assert tiles(page)["predicted perplexity"] == f"{record['predicted']['ppl']:.2f}"
    shown = [float(height.rstrip("%")) for height in heights(page)]
    kinds = list(dict.fromkeys(site["kind"] for site in record["kept"]))
    expected = [100 * site["kept"] / site["of"] for kind in kinds for site in record["kept"] if site["kind"] == kind]
    assert shown == pytest.approx(expected, abs=0.01)
    page.click("summary")
    told(page, "#table", f"{record['kept'][0]['kept']} of {record['kept'][0]['of']}")


def test_it_is_redrawn_at_once(visit, decisions):
    page = ready(visit(decisions))
    page.wait_for_selector("body[data-ready=all]")
    times = sorted(move(page, value) for value in [0.015 + 0.01 * place for place in range(30)])
    print(f"event to redraw: median {times[15]:.1f} ms, worst {times[-1]:.1f} ms")
    assert times[15] <= 50


def test_of_many_moves_only_the_last_counts(visit, decisions):
    page = ready(visit(decisions))
    page.evaluate("""() => {
      const slider = document.getElementById("ratio");
      for (let place = 0; place < 80; place += 1) {
        slider.value = String(0.1 + 0.005 * place);
        slider.dispatchEvent(new Event("input"));
      }
    }""")
    page.wait_for_timeout(300)
    last = page.evaluate("async () => (await fetch(`/api/policy?ratio=${document.getElementById('ratio').value}`)).json()")
    assert tiles(page)["parameters"] == f"{last['params']['after']:,}"


def test_keys_are_enough(visit, live):
    page = ready(visit(live[0]))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "ratio"
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    before = page.inner_text("#ratio-shown")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#ratio-shown") != before
    assert page.get_attribute("#ratio", "aria-valuetext") == page.inner_text("#ratio-shown")
    reached = []
    for _ in range(12):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    places = ["follow", "SUMMARY", "prompt", "count", "manner", "go"]
    assert [name for name in reached if name in places][: len(places)] == places


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(visit, live, scheme):
    page = ready(visit(live[0], width=390, color_scheme=scheme))
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, re.findall(r"\d+", background))) < 60) == (scheme == "dark")


def test_the_live_model_follows_the_slider_if_it_should(visit, live):
    page = ready(visit(live[0]))
    state = "async () => (await fetch('/api/state')).json()"
    page.focus("#ratio")
    page.keyboard.press("Home")
    told(page, "#facts", "ratio0.0 %")
    page.uncheck("#follow")
    page.keyboard.press("End")
    page.wait_for_timeout(200)
    assert page.evaluate(state)["ratio"] == 0
    with page.expect_response(lambda one: one.url.endswith("/api/ratio")):
        page.check("#follow")
    assert page.evaluate(state)["ratio"] == pytest.approx(float(page.input_value("#ratio")))


def test_of_many_moves_the_live_model_takes_the_last(visit, live):
    page = ready(visit(live[0]))
    page.focus("#ratio")
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    page.wait_for_timeout(2000)
    assert page.evaluate("async () => (await fetch('/api/state')).json()")["ratio"] == pytest.approx(
        float(page.input_value("#ratio"))
    )


def test_text_comes_dense_and_pruned(visit, live):
    page = ready(visit(live[0]))
    move(page, 0.5)
    bodies = []
    page.on("request", lambda one: bodies.append(one.post_data_json) if one.url.endswith("/v1/completions") else None)
    page.fill("#prompt", "w5 w6 w7")
    page.fill("#count", "12")
    page.click("#go")
    told(page, "#write-state", "Done.")
    assert [body["prune_ratio"] for body in bodies] == [0, 0.5]
    dense, pruned = page.inner_text("#dense-text"), page.inner_text("#pruned-text")
    assert dense.strip() and pruned.strip()
    assert "50.0 %" in page.inner_text("#pruned-head") and page.is_enabled("#go") and page.is_disabled("#stop")


def test_a_goal_of_memory_that_the_dense_model_has_no_room_under_leaves_the_pruned_side(visit, study):
    with running(study, target_memory="110KB", max_tokens=40) as (port, served):
        page = ready(visit(port, quiet=False))
        assert served.live.room.most_tokens(served.live.size_for(0.0).kept) == 0
        move(page, 0.55)
        page.fill("#count", "8")
        page.click("#go")
        told(page, "#dense-head", "no room under the goal of memory")
        told(page, "#write-state", "Done.")
        assert page.inner_text("#dense-text") == "" and page.inner_text("#pruned-text")
        page.close()


def test_both_sides_answer_what_was_asked(visit, live):
    page, prompts = ready(visit(live[0])), []

    def answer(route):
        prompts.append(route.request.post_data_json["prompt"])
        page.fill("#prompt", "another")
        route.continue_()

    page.route("**/v1/completions", answer)
    page.fill("#prompt", "w5 w6")
    page.fill("#count", "3")
    page.click("#go")
    told(page, "#write-state", "Done.")
    assert prompts == ["w5 w6"] * 2


def test_on_a_phone_the_focus_is_never_under_the_dial(visit, live):
    page = ready(visit(live[0], 380))
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    page.focus("#pruned-text")
    places = []
    while page.evaluate("document.activeElement.closest('.dial') === null && document.activeElement !== document.body"):
        dial, box = (page.locator(what).bounding_box() for what in (".dial", ":focus"))
        places.append(box["y"] - dial["y"] - dial["height"])
        page.keyboard.press("Shift+Tab")
    assert len(places) > 5 and min(places) >= 0


def test_a_refusal_is_told_in_the_server_s_words(visit, live):
    page = ready(visit(live[0], quiet=False))
    page.fill("#prompt", "w5 " * 1000)
    page.click("#go")
    told(page, "#write-state", "tokens")
    assert page.is_enabled("#go")


def test_without_a_model_there_is_nothing_to_write_with(visit, decisions):
    page = ready(visit(decisions))
    assert not page.is_visible("#write") and not page.is_visible("#state") and not page.is_visible("#follow-row")
    assert "Decisions alone" in page.inner_text("#foot")


def test_a_token_opens_the_page(visit, guarded_port):
    port, token = guarded_port
    page = visit(port, quiet=False)
    page.wait_for_selector("#token-form:not([hidden])")
    assert not page.is_visible("#main") and page.evaluate("document.activeElement.id") == "token"
    page.fill("#token", token)
    page.keyboard.press("Enter")
    ready(page)
    assert not page.is_visible("#token-form")
    page = ready(visit(port, path=f"/#token={token}"))
    assert token not in page.url


@pytest.mark.parametrize("wrong", ["x" * 40, "\N{SNOWMAN}" * 40])
def test_a_wrong_token_is_told_and_not_kept(visit, guarded_port, wrong):
    port, token = guarded_port
    page = visit(port, quiet=False)
    page.wait_for_selector("#token-form:not([hidden])")
    assert not page.is_visible("#alert")
    page.fill("#token", wrong)
    page.keyboard.press("Enter")
    told(page, "#alert[role=alert]", "Wrong token")
    assert page.evaluate("[document.activeElement.id, sessionStorage.length]") == ["token", 0]
    page.reload()
    page.fill("#token", token)
    page.keyboard.press("Enter")
    ready(page)
    assert not page.is_visible("#alert") and page.evaluate("sessionStorage.getItem('ppf-token')") == token


def test_a_live_ratio_beyond_what_was_trained_is_shown_as_such(visit, study):
    with running(study, ratio=0.7) as (port, _):
        page = ready(visit(port))
        assert page.inner_text("#ratio-shown") == "70.0 %" and page.is_visible("#beyond")
        page.fill("#prompt", "w5 w6 w7")
        page.fill("#count", "4")
        page.click("#go")
        told(page, "#pruned-head", "70.0 %")
        told(page, "#write-state", "Done.")
        move(page, 0.5)
        assert not page.is_visible("#beyond")
        page.close()


def test_the_focus_goes_from_generate_to_stop_and_back(visit, live):
    page = ready(visit(live[0]))
    page.route("**/v1/completions", lambda route: None)  # asked, and never answered
    for key in ("Enter", "Space"):
        page.focus("#go")
        page.keyboard.press(key)
        sync_api.expect(page.locator("#stop")).to_be_focused()
        page.keyboard.press(key)
        sync_api.expect(page.locator("#go")).to_be_focused()
        told(page, "#write-state", "Stopped.")


def test_a_number_is_left_alone_while_it_is_typed(visit, live):
    page = ready(visit(live[0]))
    sync_api.expect(page.locator("#count")).to_have_value("40")  # the server's most
    for typed in ("0", "", "999"):
        page.fill("#count", typed)
        with page.expect_response("**/api/state"):
            pass
        page.wait_for_timeout(50)
        assert page.input_value("#count") == typed
    page.focus("#prompt")
    sync_api.expect(page.locator("#count")).to_have_value("40")


def test_names_are_text(visit, decisions, browser):
    page = browser.new_page()
    nasty = "<img src=x onerror=document.title='ran'>"

    def answer(route):
        record = route.fetch().json()
        record["model"]["name"] = record["model"]["type"] = record["protocol"]["text"] = nasty
        route.fulfill(json=record)

    page.route("**/api/study", answer)
    page.goto(f"http://127.0.0.1:{decisions}/")
    ready(page)
    assert page.inner_text("#title") == nasty and page.locator("img").count() == 0 and page.title() != "ran"
    page.close()


@pytest.mark.parametrize("width", [1280, 380])
@pytest.mark.parametrize("kind", ["live", "decisions"])
def test_the_tiles_fill_their_rows(live, decisions, visit, kind, width):
    page = ready(visit(live[0] if kind == "live" else decisions, width))
    whole, tiles = page.locator("#tiles").bounding_box(), page.locator("#tiles > div")
    rows = {}
    for box in (tiles.nth(at).bounding_box() for at in range(tiles.count())):
        rows.setdefault(round(box["y"]), []).append(box)
    assert tiles.count() == (6 if kind == "live" else 5) and len(rows) < tiles.count()
    for row in rows.values():
        left, right = min(box["x"] for box in row), max(box["x"] + box["width"] for box in row)
        assert abs(left - whole["x"]) < 1 and abs(right - whole["x"] - whole["width"]) < 1
