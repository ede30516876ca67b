import io
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
    assert [line.split(", about")[0] for line in lines[2:]] == [f"measuring: {index} of 3" for index in (1, 2, 3)]
    assert [line.split(" s left ")[1] for line in lines[2:]] == ["best [1] 0", "best [1] 1", "best [1] 2"]


def test_a_long_line_is_one_line(capfd):
    Progress().say("word " * 100)
    assert capfd.readouterr().err.count("\n") == 1


def test_lines_are_few(capfd):
    work(Progress(), total=500)
    assert capfd.readouterr().err.splitlines() == ["measuring ..."]


def test_the_time_left_follows_from_the_items_done(capfd, monkeypatch):
    clock = iter([0.0, 20.0, 25.0, 60.0, 61.0])
    monkeypatch.setattr(module.time, "perf_counter", lambda: next(clock))
    progress = Progress()
    with progress.stage("measuring", 4) as advance:
        for _ in range(3):
            advance()
    expected = ["measuring ...", "measuring: 1 of 4, about 60 s left", "measuring: 3 of 4, about 20 s left"]
    assert capfd.readouterr().err.splitlines() == expected
    assert progress.seconds == {"measuring": 61.0}


def test_without_a_total_only_the_start_is_said(capfd, monkeypatch):
    monkeypatch.setattr(module, "_LINE_EVERY", 0.0)
    work(Progress(), total=None)
    assert capfd.readouterr().err.splitlines() == ["measuring ..."]


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
