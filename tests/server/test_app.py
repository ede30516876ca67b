import json
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import examples
from http_client import request, strict
from ppf.config import Target
from ppf.decide import Decider
from ppf.server import answers
from ppf.server.app import Service, create_app
from ppf.server.guard import Access
from server_runs import running


def get(port, route, **query):
    status, _, body = request(port, "GET", route + ("?" + urlencode(query) if query else ""))
    return status, strict(body)


def post(port, path, record):
    status, _, body = request(port, "POST", path, json.dumps(record).encode())
    return status, strict(body)


# --- decisions ---


@pytest.mark.parametrize(
    ("query", "target"),
    [
        ({"ratio": 0.3}, Target(ratio=0.3)),
        ({"ratio": 0}, Target(ratio=0)),
        ({"params": "17000"}, Target(params="17000")),
        ({"memory": "80KB"}, Target(memory="80KB")),
        ({"ratio": 0.4, "nested": "true"}, Target(ratio=0.4, nested=True)),
        ({"ratio": 0.4, "align": 8, "tp": 2}, Target(ratio=0.4, align=8, tp=2)),
    ],
)
def test_a_policy_is_that_of_the_library(decisions, study, query, target):
    status, record = get(decisions, "/api/policy", **query)
    expected = answers.policy_record(Decider(study), target)
    assert status == 200
    assert record.pop("fit") == get(decisions, "/api/study")[1]["fit"]
    del record["milliseconds"], expected["milliseconds"]
    assert record == json.loads(json.dumps(expected))


@pytest.mark.parametrize(
    "query",
    [
        {}, {"ratio": 0.3, "params": "1M"}, {"ratio": "nan"}, {"ratio": "inf"}, {"ratio": 1}, {"ratio": -0.1}, {"ratio": 0.999},
        {"ratio": "a third"}, {"ratio": "0.3;"}, {"params": "7Z"}, {"params": "1"}, {"memory": "3 bananas"}, {"memory": "1B"},
        {"latency_ms": 5}, {"latency_ms": -1}, {"ratio": 0.3, "align": 0}, {"ratio": 0.3, "align": 10**30}, {"ratio": 0.3, "tp": 3},
        {"ratio": 0.3, "nested": "perhaps"}, {"ratio": 0.3, "path": "/etc/passwd"}, {"params": "9" * 50}, {"ratio": ""},
    ],
)  # fmt: skip
def test_what_cannot_be_decided_is_refused_in_one_line(decisions, query):
    status, record = get(decisions, "/api/policy", **query)
    assert status == 400, record
    assert "\n" not in record["error"]["message"] and "--" not in record["error"]["message"]
    assert record["error"]["type"] == "invalid_request_error"


def test_a_field_that_comes_twice_is_refused(decisions):
    status, _, body = request(decisions, "GET", "/api/policy?ratio=0.3&ratio=0.4")
    assert status == 400 and "twice" in strict(body)["error"]["message"]


def test_without_a_model_it_says_so(decisions):
    fit = get(decisions, "/api/study")[1]["fit"]
    assert get(decisions, "/api/state") == (200, {"live": False, "fit": fit, "fits": 1})
    assert get(decisions, "/v1/models") == (200, {"object": "list", "data": []})
    for path in ("/v1/completions", "/v1/chat/completions"):
        status, record = post(decisions, path, {"model": "tiny", "prompt": "w3"})
        assert (status, record["error"]["code"]) == (404, "no_model")
    assert post(decisions, "/api/ratio", {"ratio": 0.1})[1]["error"]["code"] == "no_model"
    assert get(decisions, "/api/study")[1]["live"] is False


def test_policies_are_nested_if_the_server_says_so(study):
    with running(study, no_model=True, nested=True) as (port, _):
        own, plain = (get(port, "/api/policy", ratio=0.4, **more)[1]["kept"] for more in ({}, {"nested": "false"}))
    decider = Decider(study)
    for found, nested in ((own, True), (plain, False)):
        kept = decider.decide(Target(ratio=0.4, nested=nested)).allocation.kept.tolist()
        assert [entry["kept"] for entry in found] == kept


def test_many_at_once_get_their_own_answers(decisions, study):
    ratios = [round(0.02 + 0.005 * index, 3) for index in range(80)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda ratio: get(decisions, "/api/policy", ratio=ratio), ratios))
    decider = Decider(study)
    for ratio, (status, record) in zip(ratios, found, strict=True):
        kept = decider.decide(Target(ratio=ratio)).allocation.kept.tolist()
        assert status == 200 and [entry["kept"] for entry in record["kept"]] == kept


# --- with a model ---


def test_a_model_adds_times_to_policies(live):
    port, served = live
    for ratio in (0, 0.3, 0.6):
        _, record = get(port, "/api/policy", ratio=ratio)
        assert record["latency_ms"] == pytest.approx(served.costs.latency_at(record["ratio"]["met"]))
        assert record["memory_in_use"] == 4 * record["params"]["after"]
        assert record["tokens_per_second"] == pytest.approx(1000 / record["latency_ms"])
    status, record = get(port, "/api/policy", latency_ms=served.costs.latency_ms[0] + 1)
    assert (status, record["ratio"]["asked"]) == (200, 0)
    status, record = get(port, "/api/policy", latency_ms=served.costs.latency_ms[-1] / 2)
    assert status == 400 and "at least" in record["error"]["message"]


def test_the_live_ratio_is_set_and_told(live):
    port, served = live
    try:
        status, record = post(port, "/api/ratio", {"ratio": 0.4})
        assert status == 200 and record["ratio"]["asked"] == 0.4
        state = get(port, "/api/state")[1]
        assert (state["live"], state["ratio"], state["met"]) == (True, 0.4, record["ratio"]["met"])
        assert state["memory"]["weights"] == 4 * record["params"]["after"] and state["controller"] == {"on": False}
        assert post(port, "/api/ratio", {"ratio": 0.999})[0] == 400
        assert get(port, "/api/state")[1]["ratio"] == 0.4
    finally:
        served.set_ratio(0.0)


def test_a_long_context_takes_long_prompts(live, study, monkeypatch):
    _, served = live
    access = Access(frozenset({"localhost"}), 80)
    assert create_app(Service(Decider(study), served), access).access == access
    monkeypatch.setattr(served.live, "context", 100_000)
    assert create_app(Service(Decider(study), served), access).access.max_body == 1_600_000


def test_metrics_are_told(live):
    status, headers, body = request(live[0], "GET", "/metrics")
    assert status == 200 and headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b"\nppf_ratio 0\n" in body and b'ppf_responses_total{status="200"}' in body


# --- whatever comes ---


@pytest.mark.parametrize(("method", "path"), [("GET", "/nothing"), ("DELETE", "/api/study"), ("POST", "/"), ("GET", "/api/ratio")])
def test_unknown_routes_and_methods(decisions, method, path):
    status, headers, body = request(decisions, method, path)
    assert status in (404, 405) and strict(body)["error"]["code"] == "unknown_route"
    assert status == 404 or headers["allow"]


def test_a_fault_of_ours_is_told_without_its_inside(study, monkeypatch):
    with running(study, no_model=True) as (port, _):
        monkeypatch.setattr("ppf.server.app.policy_record", lambda *_: 1 / 0)
        status, headers, body = request(port, "GET", "/api/policy?ratio=0.3")
    assert status == 500 and headers["x-content-type-options"] == "nosniff"
    assert strict(body)["error"]["type"] == "server_error" and b"division" not in body


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from([
    "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "stream_options",
    "prune_ratio", "user", "echo", "logprobs", "ratio", "max_completion_tokens", "tools",
])  # fmt: skip
SENSIBLE = {
    "/api/ratio": {"ratio": 0.0},
    "/v1/completions": {"model": "tiny", "prompt": "w5 w6", "max_tokens": 1},
    "/v1/chat/completions": {"model": "tiny", "messages": [{"role": "user", "content": "w5"}], "max_tokens": 1},
}


AMOUNTS = [60, pytest.param(1250, marks=pytest.mark.slow)]
"""Of examples a route: what every run tries, and 5,000 in all."""


@pytest.mark.parametrize("count", AMOUNTS)
@pytest.mark.parametrize("path", SENSIBLE)
def test_bodies_of_any_shape_are_answered_or_refused(live, path, count):
    port, served = live

    @examples(count)
    @given(st.dictionaries(NAMES | st.text(max_size=8), VALUES, max_size=3))
    def check(more):
        record = {**SENSIBLE[path], **more}
        if path == "/api/ratio":
            record = more
        status, headers, body = request(port, "POST", path, json.dumps(record).encode("utf-8", "surrogatepass"))
        assert 200 <= status < 500, (record, body)
        if headers["content-type"] == "application/json":
            error = strict(body).get("error")
            assert (error is None) == (status == 200) and (error is None or error["message"].count("; ") >= 2), body

    try:
        check()
    finally:
        served.set_ratio(0.0)


@pytest.mark.parametrize("count", AMOUNTS)
def test_queries_of_any_shape_are_answered_or_refused(decisions, count):
    names = st.sampled_from(["ratio", "params", "memory", "align", "tp", "nested", "latency_ms", "x"])

    @examples(count)
    @given(st.dictionaries(names, st.text(max_size=12) | VALUES.map(str), max_size=3))
    def check(query):
        status, _ = get(decisions, "/api/policy", **{name: value.encode("utf-8", "replace") for name, value in query.items()})
        assert 200 <= status < 500

    check()
