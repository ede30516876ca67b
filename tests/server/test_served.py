import asyncio
import json
import shutil
import threading
import time

import numpy as np
import pytest

from builders import refuses
from http_client import request, strict
from live_runs import PROMPT, collect, greedy, opened, slowed
from ppf.config import Target
from ppf.decide import Decider
from ppf.errors import InputError, ResourceError
from ppf.llm.generate import Sampling
from ppf.server.controller import Goal
from ppf.server.job import Job
from ppf.server.room import Claim
from ppf.server.served import Served
from ppf.server.wire import Refusal
from ppf.study import StudyFolder
from server_runs import fit_anew, running


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


@pytest.mark.parametrize("fails_at", [0, 1, 6, 7])
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


@pytest.fixture
def refitted(study, tmp_path):
    """Another fit of the study, which keeps more of other sites."""
    own = StudyFolder(shutil.copytree(study, tmp_path / "own"))
    fit_anew(own, 0.8)
    return Decider(own.folder)


def test_another_fit_waits_for_who_makes_room_by_the_old_one(study, refitted, monkeypatch):
    live, inside, comes, go = opened(study), threading.Event(), threading.Event(), threading.Event()
    smallest = live.size_for(0.6).kept
    goal = Goal(None, live._weights(smallest) + 200 * live._kv_bytes(smallest), 0.0, 0.6)
    served, size_for, makes_room = Served(live, "tiny", 150, lambda _: goal), live.size_for, []
    served.look(goal)

    def held(ratio):
        size = size_for(ratio)
        if threading.current_thread() in makes_room:
            inside.set()
            go.wait(10)
        return size

    def make_room():
        with live.turns.lock:
            live.room.start(Claim(60, 150), live.size.kept)
            live.turns.on_need()

    monkeypatch.setattr(live, "size_for", held)

    def adopt():
        comes.set()
        served.adopt(refitted)

    threads = [threading.Thread(target=make_room), threading.Thread(target=adopt)]
    makes_room.append(threads[0])
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    assert comes.wait(10)
    go.set()
    for thread in threads:
        thread.join()
    expected = refitted.decide(Target(ratio=live.size.decision.asked, nested=True)).allocation.kept
    assert live.decider is refitted and live.elastic.current is live.size.view and (live.size.kept == expected).all()
    live.close()


def test_another_fit_that_needs_more_at_the_same_ratio_rises_at_once(study, refitted):
    live = opened(study)
    target = next(
        target
        for target in (Target(ratio=ratio, nested=True) for ratio in np.linspace(0.05, 0.55, 51).tolist())
        if live._kv_bytes(refitted.decide(target).allocation.kept) > live._kv_bytes(live.decider.decide(target).allocation.kept)
    )
    before, tokens = live.set_ratio(target.ratio).kept, 5000
    goal = Goal(None, live._weights(before) + tokens * live._kv_bytes(before) + 1000, target.ratio, 0.6)
    served = Served(live, "tiny", 150, lambda _: goal)
    live.room.start(Claim(tokens, tokens), before)
    assert live.room.holds(before)
    served.adopt(refitted)
    assert live.size.decision.asked > target.ratio and live.room.holds(live.size.kept)
    live.close()


def test_who_could_never_start_after_another_fit_is_refused_and_the_next_one_runs(study, refitted, monkeypatch):
    live = opened(study)
    live._workers = 3
    slowed(live, monkeypatch, 0.01)
    memory = live._weights(live.size_for(0.6).kept) + 60 * 10**3
    served = Served(live, "tiny", 40, lambda fit: Goal(None, memory - 10_000 * (fit is refitted), 0.0, 0.6))
    first, second, third = greedy(10), greedy(live.room.most_tokens() - len(PROMPT)), greedy(5)
    found = collect(live, first, second, third, then=lambda piece: piece.tokens == 3 and served.adopt(refitted), failing=True)
    assert isinstance(found[1], Refusal) and (found[1].status, found[1].code) == (503, "no_memory")
    assert [found[at][-1].finish is not None for at in (0, 2)] == [True, True] and not live.room.waiting
    assert {end: live.meter.counts[end] for end in ("done", "refused", "failed")} == {"done": 2, "refused": 1, "failed": 0}
    live.close()


def test_another_fit_waits_until_requests_under_way_have_room_by_it(study, refitted, monkeypatch):
    live = opened(study)
    memory = live._weights(live.size_for(0.6).kept) + 60 * 10**3
    served = Served(live, "tiny", 40, lambda fit: Goal(None, memory - 10_000 * (fit is refitted), 0.0, 0.6))
    most, before = live.room.most_tokens(), (live.decider, live.size, live.room.goal, live.room.top, served.goal)
    live.room.start(Claim(4, most), live.size.kept)
    view, meanwhile = live.elastic.view, []
    with monkeypatch.context() as patch, refuses(ResourceError):
        patch.setattr(live.elastic, "view", lambda allocation: meanwhile.append(live.decider) or view(allocation))
        served.adopt(refitted)
    assert len(meanwhile) == 8 and set(meanwhile) == {before[0]}  # by which others are answered all the while
    assert (live.decider, live.size, live.room.goal, live.room.top, served.goal) == before
    live.room.running.clear()
    served.adopt(refitted)
    assert live.decider is refitted and live.room.most_tokens() < most
    live.close()


def test_another_fit_by_which_nothing_has_room_is_refused(study, refitted):
    live = opened(study)
    goals = {live.decider: Goal(None, 10**12, 0.0, 0.6), refitted: Goal(None, 1000, 0.0, 0.6)}
    served = Served(live, "tiny", 40, goals.__getitem__)
    before = live.decider
    with refuses(InputError):
        served.adopt(refitted)
    assert live.decider is before and live.room.goal == 10**12
    live.close()


def test_a_goal_of_memory_takes_nested_policies_and_says_so(study, caplog):
    with running(study, target_memory="10MB") as (port, served):
        assert served.live.nested and strict(request(port, "GET", "/api/state")[2])["nested"]
        assert strict(request(port, "GET", "/api/policy?ratio=0.4")[2]) | {"milliseconds": 0} == strict(
            request(port, "GET", "/api/policy?ratio=0.4&nested=true")[2]
        ) | {"milliseconds": 0}
    assert [record.message for record in caplog.records if "nested" in record.message] == [
        "policies are nested, since --target-memory came: of others two sizes together read more than either"
    ]


def test_a_goal_of_memory_is_kept_at_every_token_whatever_comes(study, monkeypatch):
    live = opened(study)
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
    threads, seen = [], []

    def then(piece):
        if not threads:  # the second comes while the first runs
            threads.append(threading.Thread(target=lambda: live.turns.enter(second) and live.turns.leave(second)))
            threads[0].start()
        seen.append((len(live.room.running), second.claim.kept is None))

    (pieces,) = collect(live, first, then=then)
    threads[0].join(10)
    assert set(seen[: min(5, len(seen) - 1)]) == {(1, True)} and len(pieces) > 1
    assert second.claim.kept is not None and not live.room.running and not live.room.waiting  # after it
    assert served.live.meter.counts["done"] >= 1
    live.close()


def test_who_waits_for_room_gives_up_the_place_when_cancelled(study):
    live = opened(study)
    smallest = live.size_for(0.6).kept
    live.keep_within(live._weights(smallest) + 40 * live._kv_bytes(smallest), 0.6)
    live.room.start(Claim(10, 40), smallest)  # and never ends
    job = greedy(5)

    async def leave_soon():
        live.admit(job)
        asyncio.get_running_loop().call_later(0.3, live.leave, job)
        return [piece async for piece in live.pieces(job)]

    assert asyncio.run(leave_soon()) == [] and not live.room.waiting and len(live.room.running) == 1
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
    for limits, words in (({"max_ratio": 0.999}, "--max-ratio"), ({"min_ratio": 0.99}, "--min-ratio")):
        with refuses(InputError) as caught, running(study, target_latency_ms=5.0, **limits):
            pass
        assert words in str(caught.value) and f"; {next(iter(limits.values())):g} came" in str(caught.value)


def test_a_memory_that_no_ratio_meets_is_refused(study):
    with refuses(InputError) as caught, running(study, target_memory="1KB"):
        pass
    assert "--target-memory" in str(caught.value)
