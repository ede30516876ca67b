import threading
import time

import numpy as np
import pytest

from ppf.llm.generate import Sampling
from ppf.server.job import Job
from ppf.server.room import Room
from ppf.server.turns import Turns
from ppf.server.wire import Refusal

WEIGHT, CACHE = 1000, 1


def kept(units):
    return np.array([units])


@pytest.fixture
def turns():
    """Of a model of up to 100 units, at 100 of them, which may go down to 40."""
    room = Room(lambda units: int(units[0]) * WEIGHT, lambda units: int(units[0]) * CACHE, 120_000, kept(40))
    made = Turns(room, lambda: made.units)
    made.room, made.units = room, kept(100)
    return made


def job(most):
    return Job([1] * 10, Sampling(most - 10))


def waiting(target, *given):
    """A thread, and whether it still waits after a moment."""
    thread = threading.Thread(target=target, args=given, daemon=True)
    thread.start()
    thread.join(0.3)
    return thread, thread.is_alive()


def test_who_needs_more_waits_until_the_other_has_come(turns):
    first, second = job(400), job(400)
    for one in (first, second):
        with turns.lock:
            turns.room.start(one.claim, turns.units)

    def rise():
        turns.units = kept(60)

    turns.on_need = rise
    turns.note(first, 64)
    assert first.claim.paused and not turns.may_go_on(first)

    def go_on():
        while not turns.may_go_on(first):
            pass

    thread, waits = waiting(go_on)
    assert waits
    turns.come(second, kept(60))
    thread.join(5)
    assert not thread.is_alive() and not first.claim.paused


def test_only_the_first_in_the_queue_asks_for_room(turns):
    asked = []
    turns.on_need = lambda: asked.append(threading.get_ident())
    turns.room.start(job(1400).claim, kept(40))
    jobs = [job(1000), job(900)]
    threads = [waiting(turns.enter, one)[0] for one in jobs]
    time.sleep(0.3)  # both look again
    assert len(asked) > 1 and set(asked) == {threads[0].ident} and len(turns.room.waiting) == 2
    for one in jobs:
        one.cancelled.set()
    for thread in threads:
        thread.join(5)
    assert not turns.room.waiting


def test_who_could_never_start_any_more_is_refused(turns):
    refused = []

    def enter(one):
        try:
            turns.enter(one)
        except Refusal as refusal:
            refused.append(refusal.code)

    turns.room.start(job(1500).claim, kept(40))
    thread, waits = waiting(enter, job(turns.room.most_tokens()))
    assert waits
    turns.room.top = kept(45)
    thread.join(5)
    assert refused == ["no_memory"] and not turns.room.waiting


def test_three_that_need_more_at_once_come_to_the_smaller_size_within_the_goal(turns):
    weight, together, most_used = 200_000, threading.Barrier(3), []
    turns.room.weights, turns.room.kv = (lambda units: int(units[0]) * weight), (lambda units: int(units[0]) * CACHE)
    turns.room.goal = 100 * weight + 3 * 128 * 100 * CACHE

    def rise():
        while not turns.room.holds(turns.units):
            turns.units = turns.units - 2

    def run(one):
        for cached in range(11, 300):
            while not turns.may_go_on(one):
                pass
            turns.come(one, turns.units)
            if cached == 64:
                together.wait(10)
            turns.note(one, cached)
            with turns.lock:
                most_used.append(sum(turns.room.in_use(turns.units)))
        turns.leave(one)

    turns.on_need = rise
    jobs = [job(700) for _ in range(3)]
    for one in jobs:
        turns.room.start(one.claim, turns.units)
    threads = [waiting(run, one)[0] for one in jobs]
    for thread in threads:
        thread.join(10)
    assert not turns.room.running and len(most_used) == 3 * 289 and max(most_used) <= turns.room.goal
