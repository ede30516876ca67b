import io
import re
import sys
import time

import pytest

from ppf import progress as module
from ppf.progress import Progress


class Terminal(io.StringIO):
    """Takes what is written and says that it is a terminal."""

    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """Whatever the surroundings say of terminals and colours does not count."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def work(progress, name="measuring", total=3, note=""):
    with progress.stage(name, total) as advance:
        for index in range(total or 2):
            advance(f"{note} {index}" if note else "")


def test_quiet_shows_nothing(capfd):
    progress = Progress(quiet=True)
    progress.say("a line")
    work(progress, note="best")
    work(progress, total=None)
    assert capfd.readouterr() == ("", "")
    assert list(progress.seconds) == ["measuring"]


def test_lines_come_where_there_is_no_terminal(capfd, monkeypatch):
    monkeypatch.setattr(module, "_LINE_EVERY", 0.0)
    progress = Progress()
    progress.say("study [done]")
    work(progress, note="best [1]")
    out, err = capfd.readouterr()
    assert out == "" and "\x1b" not in err
    lines = err.splitlines()
    assert lines[:2] == ["study [done]", "measuring ..."]
    assert [line.split(", ")[0] for line in lines[2:4]] == [f"measuring: {index} of 3" for index in (1, 2)]
    assert [line.split(" s left  ")[1] for line in lines[2:4]] == ["best [1] 0", "best [1] 1"]
    assert lines[4:] == ["measuring: done in 0 s  best [1] 2"]


def test_a_long_line_is_one_line(capfd):
    Progress().say("word " * 100)
    assert capfd.readouterr().err.count("\n") == 1


def test_lines_are_few(capfd):
    work(Progress(), total=500)
    assert capfd.readouterr().err.splitlines() == ["measuring ..."]


def test_the_time_left_follows_from_the_items_done(capfd, monkeypatch):
    clock = iter([0.0, 20.0, 25.0, 60.0, 61.0, 61.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    progress = Progress()
    with progress.stage("measuring", 4) as advance:
        for _ in range(3):
            advance()
    assert capfd.readouterr().err.splitlines() == [
        "measuring ...",
        "measuring: 1 of 4, 3.0/min, about 60 s left",
        "measuring: 3 of 4, 3.0/min, about 20 s left",
        "measuring: done in 61 s",
    ]
    assert progress.seconds == {"measuring": 61.0}


def test_without_a_total_only_the_start_is_said(capfd):
    work(Progress(), total=None)
    assert capfd.readouterr().err.splitlines() == ["measuring ..."]


def test_what_was_at_hand_does_not_count_for_long(capfd, monkeypatch):
    monkeypatch.setattr(module, "_RECENT", 5)
    clock = iter([0.0] * 101 + [20.0, 40.0, 60.0, 80.0, 80.0, 80.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    with Progress().stage("measuring", 110) as advance:
        for _ in range(104):
            advance()
    assert "measuring: 104 of 110, 3.0/min, about 120 s left" in capfd.readouterr().err


def test_a_planned_stage_says_where_it_stands(capfd):
    progress = Progress()
    progress.plan(["text", "measuring", "agent"])
    for name in ("measuring", "something else", "agent"):
        work(progress, name)
    assert capfd.readouterr().err.splitlines() == ["[2/3] measuring ...", "something else ...", "[3/3] agent ..."]
    assert set(progress.seconds) == {"measuring", "something else", "agent"}


@pytest.mark.parametrize("terminal", [True, False])
def test_a_stage_may_lie_within_another(monkeypatch, terminal):
    screen = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress()
    with progress.stage("bench", 2) as advance:
        work(progress, "search")
        advance("best of all")
        work(progress, "search")
    work(progress, "after")
    assert "search" in screen.getvalue() and "after" in screen.getvalue()
    assert set(progress.seconds) == {"bench", "search", "after"} and progress.seconds["bench"] >= progress.seconds["search"]
    assert progress._bars is None


@pytest.mark.parametrize("width", [80, 130])
def test_on_a_narrow_terminal_only_the_note_gives_way(monkeypatch, width):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(width))
    progress = Progress()
    progress.plan(["x"] * 17 + ["measuring round 5"])
    with progress.stage("measuring round 5", 3) as advance:
        for _ in range(3):
            time.sleep(0.02)
            advance("best " + "of all " * 20)
    last = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue()).rstrip("\n").splitlines()[-1].split("\r")[-1]
    assert "[18/18] measuring round 5" in last and "3/3" in last and "/s" in last and "0:00:00" in last and "best of" in last
    assert len(last) <= width and last.rstrip().endswith("…")


@pytest.mark.parametrize(("speed", "words"), [(12.34, "12.3/s"), (1.0, "1.0/s"), (0.5, "30.0/min"), (0.01, "0.6/min")])
def test_a_rate_is_of_a_second_or_a_minute(speed, words):
    assert module._rate(speed) == words


@pytest.mark.parametrize("total", [3, None])
def test_a_terminal_has_bars(monkeypatch, total):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    progress = Progress()
    work(progress, total=total, note="best")
    shown = screen.getvalue()
    assert "measuring" in shown and "\x1b[" in shown
    assert ("3/3" if total else "1/1") in shown and f"best {2 if total else 1}" in shown
    assert progress.seconds["measuring"] > 0


@pytest.mark.parametrize("quiet", [True, False])
@pytest.mark.parametrize("terminal", [True, False])
def test_seconds_count_even_when_a_stage_fails(monkeypatch, quiet, terminal):
    monkeypatch.setattr(sys, "stderr", Terminal() if terminal else io.StringIO())
    progress = Progress(quiet)
    with pytest.raises(ZeroDivisionError), progress.stage("fit", 2) as advance:
        advance()
        time.sleep(0.01)
        raise ZeroDivisionError
    assert progress.seconds["fit"] >= 0.01


def test_a_stage_that_comes_again_adds_up():
    progress = Progress(quiet=True)
    for name in ("search", "fit", "search"):
        with progress.stage(name):
            time.sleep(0.01)
    assert set(progress.seconds) == {"search", "fit"}
    assert progress.seconds["search"] >= 0.02 > progress.seconds["fit"] * 0.5
