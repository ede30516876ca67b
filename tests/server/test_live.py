import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import tiny_models
from builders import refuses
from live_runs import PROMPT, collect, greedy, opened, slowed, text
from ppf.errors import InputError
from ppf.llm.generate import Sampling
from ppf.server import live as live_module
from ppf.server.job import Job
from ppf.server.metrics import Meter
from ppf.server.room import Claim
from ppf.server.wire import Refusal
from ppf.space.allocation import Allocation
from server_runs import study_of


@pytest.fixture(scope="module")
def model(study):
    live = opened(study)
    yield live
    live.close()


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
    monkeypatch.setattr(model, "meter", Meter())
    (pieces,) = collect(model, greedy(30))
    assert 0 < len(pieces) < 15 and pieces[-1].finish is None
    assert model.meter.counts["done"] == 1 and not model.meter.counts["cancelled"]  # the client has what there is


def test_a_finished_answer_waits_for_no_room_and_takes_none(study, monkeypatch):
    live = opened(study)
    whole, needed = live.size.kept, []
    live.keep_within(live._weights(whole) + 2 * 128 * live._kv_bytes(whole), 0.6)
    live.turns.on_need = lambda: needed.append(len(live.room.running))
    live.room.start(Claim(60, 120), whole)  # in a long step, which ends after the answer
    parts = live_module.generate

    def stopped(*given):
        return (replace(piece, finish="stop") if piece.tokens == 5 else piece for piece in parts(*given))

    monkeypatch.setattr(live_module, "generate", stopped)
    (pieces,) = collect(live, Job([5] * 60, Sampling(100, temperature=0)))  # its last token is the first of another block
    assert pieces[-1].finish == "stop" and pieces[-1].tokens == len(pieces) == 5
    assert needed == [1] and len(live.room.running) == 1  # to start, and no more
    live.close()


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


def test_costs_timed_on_a_busy_machine_are_mended_by_what_runs(model, monkeypatch):
    monkeypatch.setattr(model, "meter", Meter())
    monkeypatch.setattr(model, "costs", replace(model.costs, latency_ms=100 * model.costs.latency_ms))
    (pieces,) = collect(model, greedy(20))
    model.learn()
    steps = [1e3 * piece.seconds for piece in pieces[1:]]
    assert min(steps) * 0.9 < model.costs.latency_ms[0] < max(steps) * 1.1
