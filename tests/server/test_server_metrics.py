import re
from pathlib import Path

import pytest

from ppf.server import metrics
from ppf.server.metrics import Meter, prometheus

API = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
STATE = {
    "live": True, "fits": 2, "ratio": 0.25, "tokens_per_second": 40.0, "latency_ms": 25.0, "first_token_ms": None,
    "memory": {"weights": 1000, "kv_cache": 10}, "tokens": {"prompt": 7, "completion": 9},
    "requests": {"running": 2, "waiting": 0, "done": 5, "failed": 0, "refused": 1, "cancelled": 0},
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch):
    """Time that stands until it is moved."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def test_the_text_is_what_prometheus_reads():
    lines = prometheus(STATE, {200: 5, 404: 1}).splitlines()
    named = {}
    for line in lines:
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split(" ")
            assert kind in ("gauge", "counter") and name not in named and (kind == "counter") == name.endswith("_total")
            named[name] = 0
        elif not line.startswith("#"):
            found = re.fullmatch(r'(ppf_[a-z_]+)(\{[a-z]+="[a-z0-9_]+"\})? (-?[0-9.e+-]+)', line)
            named[found[1]] += 1
            float(found[3])
    assert named["ppf_responses_total"] == named["ppf_memory_bytes"] == 2 and all(named.values())
    assert (
        "ppf_ratio 0.25" in lines
        and "ppf_fits_total 2" in lines
        and "ppf_token_latency_seconds 0.025" in lines
        and 'ppf_memory_bytes{kind="weights"} 1000' in lines
    )
    assert "ppf_first_token_seconds" not in named


def test_without_a_model_there_are_answers_alone():
    assert "ppf_ratio" not in prometheus({"live": False, "fits": 1}, {200: 1})


def test_nothing_measured_yet():
    meter = Meter()
    assert (meter.times, meter.latency_ms, meter.first_token_ms, meter.tokens_per_second) == ([], None, None, 0.0)


def test_recent_steps_count_and_old_ones_do_not(clock):
    meter = Meter()
    for seconds, ratio in ((0.01, 0.0), (0.02, 0.1), (0.04, 0.2)):
        clock[0] += seconds
        meter.note_step(seconds, ratio)
    assert (meter.times, meter.latency_ms) == ([(0.0, 10.0), (0.1, 20.0), (0.2, 40.0)], 20.0)
    clock[0] += 60
    assert (meter.times, meter.latency_ms, meter.tokens_per_second) == ([], None, 0.0)
    meter.note_step(0.005, 0.5)
    assert (meter.times, meter.latency_ms) == ([(0.5, 5.0)], 5.0)


def test_speed_is_over_the_time_in_which_something_ran(clock):
    meter = Meter()
    for pause in (0, 0, 3, 0):
        clock[0] += 0.1 + pause
        meter.note_step(0.1, 1.0)
    assert meter.tokens_per_second == pytest.approx(10)
    for _ in range(4):  # a second request beside the first
        meter.note_step(0.1, 1.0)
    assert meter.tokens_per_second == pytest.approx(20)


def test_first_tokens(clock):
    meter = Meter()
    for seconds in (0.1, 0.3, 0.2):
        meter.note_first(seconds)
    assert meter.first_token_ms == pytest.approx(200)
    clock[0] += 60
    assert meter.first_token_ms is None
    meter.note_first(0.5)
    assert meter.first_token_ms == pytest.approx(500)


def test_the_documentation_lists_them_all_in_the_same_words():
    state = {**STATE, "first_token_ms": 1.0}
    lines = prometheus(state, {200: 5}).splitlines()
    told = {}
    for line in lines:
        if line.startswith("# HELP"):
            _, _, name, what = line.split(" ", 3)
            told[name] = [what]
        elif line.startswith("# TYPE"):
            told[line.split(" ")[2]].append(line.split(" ")[3])
        elif label := re.search(r'\{([a-z]+)="([a-z0-9_]+)"', line):
            told[line.split("{")[0]].append(label.groups())
    written = re.findall(r"^\| `(ppf_[a-z_]+)(?:\{([^}]*)\})?` \| (gauge|counter) \| (.*) \|$", API, re.MULTILINE)
    assert [name for name, *_ in written] == list(told)
    for name, labels, kind, what in written:
        said, is_kind, *pairs = told[name]
        assert (what, kind) == (said, is_kind)
        label, _, values = labels.partition("=")
        assert {one for one, _ in pairs} == ({label} if label else set())
        assert label == "status" or {value for _, value in pairs} == set(filter(None, values.split(", ")))
