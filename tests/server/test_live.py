import asyncio
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import tiny_models
from builders import refuses
from http_client import request, strict
from ppf.decide import Decider
from ppf.errors import InputError
from ppf.llm.generate import Sampling
from ppf.progress import Progress
from ppf.recipes.live import elastic_for
from ppf.server.controller import Goal
from ppf.server.job import Job
from ppf.server.live import Live
from ppf.server.metrics import Meter
from ppf.server.served import Served
from ppf.server.wire import Refusal
from ppf.space.allocation import Allocation
from server_runs import running, study_of

PROMPT = [5, 9, 40, 7]


def opened(study, ratio=0.0, nested=True):
    decider = Decider(study)
    elastic, tokenizer = elastic_for(decider, None, "cpu", "auto", Progress(quiet=True))
    return Live(decider, elastic, tokenizer, ratio, nested, timing_seconds=0.0)


@pytest.fixture(scope="module")
def model(study):
    live = opened(study)
    yield live
    live.close()


def collect(live, *jobs, then=lambda piece: None):
    """All pieces of jobs that run side by side; ``then`` sees each piece of the first."""

    async def one(job, see):
        found = []
        live.admit(job)
        async for piece in live.pieces(job):
            see(piece)
            found.append(piece)
        return found

    async def all_of_them():
        return await asyncio.gather(*(one(job, then if job is jobs[0] else lambda _: None) for job in jobs))

    return asyncio.run(all_of_them())


def greedy(count, **options):
    return Job(PROMPT, Sampling(count, temperature=0), **options)


def text(pieces):
    return "".join(piece.text for piece in pieces)


def slowed(live, monkeypatch, seconds=0.02):
    """Lets every token take a while."""
    at = live.elastic.at

    def slow(*view):
        time.sleep(seconds)
        return at(*view)

    monkeypatch.setattr(live.elastic, "at", slow)


def test_requests_of_different_ratios_side_by_side(model):
    sizes = [model.size_for(ratio) for ratio in (0, 0.2, 0.4, 0.6)]
    alone = [text(collect(model, greedy(6, size=size))[0]) for size in sizes]
    together = collect(model, *(greedy(6, size=size) for size in sizes * 2))
    assert [text(pieces) for pieces in together] == alone * 2
    assert len(set(alone)) > 1


def test_a_request_without_a_ratio_follows_the_live_one_and_tells_what_became_of_its_cache(model, monkeypatch):
    slowed(model, monkeypatch)
    job, turns = greedy(30), {5: 0.6, 15: 0.0}
    try:
        collect(model, job, then=lambda piece: piece.tokens in turns and model.set_ratio(turns[piece.tokens]))
    finally:
        model.set_ratio(0.0)
    assert [switch["cache"] for switch in job.switches] == ["narrowed", "rebuilt"]
    assert job.switches[0]["ratio"] >= 0.6 and job.switches[1]["ratio"] == 0 and 5 < job.switches[0]["token"] < 15


def test_a_request_with_a_ratio_does_not_follow(model, monkeypatch):
    slowed(model, monkeypatch)
    job = greedy(10, size=model.size_for(0.2))
    expected = text(collect(model, greedy(10, size=model.size_for(0.2)))[0])
    try:
        (pieces,) = collect(model, job, then=lambda piece: piece.tokens == 2 and model.set_ratio(0.6))
    finally:
        model.set_ratio(0.0)
    assert text(pieces) == expected and job.switches == []


def test_what_runs_is_told(model, monkeypatch):
    slowed(model, monkeypatch)
    monkeypatch.setattr(model, "meter", Meter())  # the last seconds of other tests are none of its own
    seen = []
    collect(model, *(greedy(6) for _ in range(6)), then=lambda _: seen.append((model.state(), model.load())))
    state, load = seen[-1]
    assert state["requests"]["running"] + state["requests"]["waiting"] > 0 and load.tokens >= 4
    assert state["memory"]["kv_cache"] >= 4 * 3 * 4 * 2 * 8 * 4  # tokens, layers, groups, key and value, width, bytes
    assert state["latency_ms"] >= 20 and load.slowdown > 1 and 0 < state["tokens_per_second"] < 1000
    idle = model.state()
    assert idle["memory"]["kv_cache"] == idle["requests"]["running"] == 0 and idle["requests"]["done"] == 6
    json.dumps(idle, allow_nan=False)


def test_costs_fall_with_the_ratio(model):
    costs = model.costs
    assert costs.ratios[0] == 0 and (np.diff(costs.ratios) > 0).all() and costs.ratios[-1] >= 0.6
    assert (np.diff(costs.weights) < 0).all() and (np.diff(costs.latency_ms) <= 0).all() and (costs.latency_ms > 0).all()
    assert costs.weights[0] == 4 * model.decider.layout.total


def test_attention_that_is_gone_still_takes_its_part_of_the_cache(tmp_path):
    live = opened(study_of(tmp_path / "study", tiny_models.save(tmp_path / "tiny", "llama-mha"), depth=True).folder)
    layout = live.decider.layout
    for kept in (layout.units, layout.floors, np.where(layout.floors, layout.units, 0)):
        cache, view = DynamicCache(config=live.elastic.config), live.elastic.view(Allocation(kept))
        with live.elastic.at(view) as model:
            model(input_ids=torch.tensor([PROMPT]), past_key_values=cache, use_cache=True)
        held = sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))
        assert live._kv_bytes(kept) * len(PROMPT) == held
    assert not layout.floors.all()
    live.close()


def test_a_request_whose_time_is_up_ends(model, monkeypatch):
    monkeypatch.setattr("ppf.server.live._SECONDS", 0.1)
    slowed(model, monkeypatch)
    (pieces,) = collect(model, greedy(30))
    assert 0 < len(pieces) < 15 and pieces[-1].finish is None


def test_closing_ends_what_runs(study, monkeypatch):
    live = opened(study)
    slowed(live, monkeypatch)
    (pieces,) = collect(live, greedy(30), then=lambda piece: piece.tokens == 3 and live.close())
    assert 3 <= len(pieces) < 10
    with pytest.raises(Refusal):
        collect(live, greedy(3))


def test_a_ratio_beyond_the_floors_is_refused(study):
    with refuses(InputError):
        opened(study, ratio=0.999)


# --- the controller over the model ---


def no_memory(*_):
    raise MemoryError


def test_the_controller_changes_the_ratio_and_tells_why(study, caplog):
    live = opened(study)
    goal = Goal(None, int(live.costs.weights[0] * 0.8), 0.0, 0.6)
    served = Served(live, "tiny", 8, lambda _: goal)
    served.look(goal)
    state = served.state()
    assert state["memory"]["weights"] <= goal.memory and state["ratio"] == live.size.decision.asked > 0.1
    assert state["controller"]["on"] and state["controller"]["target"] == {"latency_ms": None, "memory": goal.memory}
    (decision,) = state["controller"]["decisions"]
    assert decision["from"] == 0 and decision["to"] == state["ratio"] and "missed" in decision["reason"]
    assert "ratio 0.000 -> " in caplog.text
    served.look(goal)
    assert len(served.state()["controller"]["decisions"]) == 1
    live.close()


def test_a_ratio_that_could_not_be_set_is_tried_at_the_next_look(study, monkeypatch):
    live = opened(study)
    goal = Goal(None, int(live.costs.weights[0] * 0.8), 0.0, 0.6)
    served = Served(live, "tiny", 8, lambda _: goal)
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(live.elastic, "view", no_memory)
        served.look(goal)
    assert live.size.decision.asked == 0 and served.state()["controller"]["decisions"] == []
    served.look(goal)
    (decision,) = served.state()["controller"]["decisions"]
    assert live.size.decision.asked == decision["to"] > 0.1
    live.close()


@pytest.mark.parametrize("fails_at", [0, 1, 6])
def test_another_fit_is_taken_as_a_whole_or_not_at_all(study, monkeypatch, fails_at):
    live, other = opened(study, ratio=0.5), Decider(study)
    goals = {live.decider: Goal(None, 10**12, 0.0, 0.6), other: Goal(None, 10**12, 0.0, 0.3)}
    served = Served(live, "tiny", 8, goals.__getitem__)
    before = (live.decider, live.size, live.elastic.current, live.costs, served.goal, served.state())
    view, calls = live.elastic.view, iter(range(100))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(live.elastic, "view", lambda allocation: view(allocation) if next(calls) < fails_at else no_memory())
        served.adopt(other)
    assert (live.decider, live.size, live.elastic.current, live.costs, served.goal, served.state()) == before
    served.adopt(other)
    assert live.decider is other and served.goal is goals[other] and live.size.decision.asked == 0.3
    assert [one["to"] for one in served.state()["controller"]["decisions"]] == [0.3]
    live.close()


def test_a_goal_of_memory_is_kept_at_every_token_whatever_comes(study, monkeypatch):
    live = opened(study, nested=False)
    smallest = live.size_for(0.6).kept
    goal = Goal(None, live._weights(smallest) + 200 * live._kv_bytes(smallest), 0.0, 0.6)
    served, ratios, used, running = Served(live, "tiny", 150, lambda _: goal), [], [], []
    served.look(goal)

    def see(_):
        state = live.state()
        used.append(sum(state["memory"].values()))
        ratios.append(state["ratio"])
        running.append(state["requests"]["running"])

    sizes = [None, None, live.size_for(0.6), None, None]
    jobs = [Job(PROMPT, Sampling(70, temperature=0), size) for size in sizes]
    monkeypatch.setattr("ppf.llm.generate._ends", lambda *_: set())
    found = collect(live, *jobs, then=see)
    assert [pieces[-1].tokens for pieces in found] == [70] * 5  # all had their turn
    assert max(used) <= goal.memory and max(running) >= 1
    assert max(ratios) > served.state()["controller"]["decisions"][0]["to"]
    assert not live.room.running and not live.room.waiting
    live.close()


def test_a_request_waits_until_there_is_room_for_all_that_it_may_take(study, monkeypatch):
    live = opened(study)
    live._workers = 2
    slowed(live, monkeypatch, 0.01)
    served = Served(live, "tiny", 40, lambda _: Goal(None, live._weights(live.size_for(0.6).kept) + 60 * 10**3, 0.0, 0.6))
    most = live.room.most_tokens() - len(PROMPT)
    first, second = greedy(most), greedy(5)
    seen = []
    collect(live, first, second, then=lambda piece: piece.tokens < 5 and seen.append(live.state()["requests"]))
    assert {(one["running"], one["waiting"]) for one in seen[1:]} == {(1, 1)}
    assert served.live.meter.counts["done"] >= 1
    live.close()


def test_who_waits_for_room_gives_up_the_place_when_cancelled(study):
    live = opened(study)
    live.keep_within(1, 0.6)  # for nobody
    job = greedy(5)

    async def leave_soon():
        live.admit(job)
        asyncio.get_running_loop().call_later(0.3, live.leave, job)
        return [piece async for piece in live.pieces(job)]

    assert asyncio.run(leave_soon()) == [] and not live.room.waiting and not live.room.running
    live.close()


def test_what_no_ratio_has_memory_for_is_refused_at_once(study):
    with running(study, target_memory="10MB", max_tokens=40) as (port, served):
        ask = {"model": "tiny", "prompt": [5] * 20, "max_tokens": 30}
        live = served.live
        live.room.goal = live.room.least(40)
        for path, extra in (("completions", {}), ("chat/completions", {"messages": [{"role": "user", "content": "w5 " * 20}]})):
            body = {name: value for name, value in ask.items() if path == "completions" or name != "prompt"} | extra
            status, _, answer = request(port, "POST", f"/v1/{path}", json.dumps(body).encode())
            assert status == 400 and strict(answer)["error"]["code"] == "no_memory" and "at most 40 tokens" in str(strict(answer))
        status, _, answer = request(
            port, "POST", "/v1/completions", json.dumps({**ask, "max_tokens": 1, "prune_ratio": 0}).encode()
        )
        assert status == 400 and "larger prune_ratio" in strict(answer)["error"]["message"]
        body = {
            "messages": [{"role": "user", "content": "w5 w6"}],
            "temperature": 0,
            "stop": "never",
        }  # without a number: what fits
        status, _, answer = request(port, "POST", "/v1/chat/completions", json.dumps(body).encode())
        assert status == 200 and strict(answer)["usage"]["total_tokens"] <= 40


def test_costs_timed_on_a_busy_machine_are_mended_by_what_runs(model):
    model.costs = replace(model.costs, latency_ms=100 * model.costs.latency_ms)
    (pieces,) = collect(model, greedy(20))
    model.learn()
    steps = [1e3 * piece.seconds for piece in pieces[1:]]
    assert min(steps) * 0.9 < model.costs.latency_ms[0] < max(steps) * 1.1


def test_under_load_a_server_with_a_goal_shrinks_its_model_within_its_limits(study, monkeypatch):
    with running(study, target_latency_ms=1e6, max_ratio=0.5, min_ratio=0.1, max_tokens=40) as (port, served):
        assert served.live.size.decision.asked == 0.1
        status, _, body = request(port, "POST", "/api/ratio", b'{"ratio": 0.3}')
        assert (status, strict(body)["error"]["code"]) == (409, "controlled")
        slowed(served.live, monkeypatch, 0.05)
        served.goal = Goal(served.live.costs.latency_ms[0] * 1.5, None, 0.1, 0.5)
        ask = json.dumps({"model": "tiny", "prompt": "w5", "max_tokens": 40, "temperature": 0, "stop": ["never"]}).encode()
        assert request(port, "POST", "/v1/completions", ask)[0] == 200
        end = time.monotonic() + 5
        while served.live.size.decision.asked < 0.5 and time.monotonic() < end:
            time.sleep(0.05)
        state = strict(request(port, "GET", "/api/state")[2])
        assert state["ratio"] == 0.5 and state["controller"]["limits"] == {"min_ratio": 0.1, "max_ratio": 0.5}
        assert state["controller"]["decisions"][-1]["to"] == 0.5


def test_limits_beyond_the_model_are_refused(study):
    for limits in ({"max_ratio": 0.999}, {"min_ratio": 0.99, "target_latency_ms": 5.0}):
        with refuses(InputError), running(study, **limits):
            pass


def test_a_memory_that_no_ratio_meets_is_refused(study):
    with refuses(InputError) as caught, running(study, target_memory="1KB"):
        pass
    assert "--target-memory" in str(caught.value)
