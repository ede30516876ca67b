from dataclasses import dataclass, field

import numpy as np
import pytest

from ppf.server.controller import LEAST, Costs, Goal, State, rise, step
from ppf.server.room import Claim, Room

UNITS, WEIGHT, CACHE = 1000, 10_000, 10  # bytes of a unit's weights, and of its part of a token's cache
RATIOS = np.linspace(0, 0.6, 6)
COSTS = Costs(RATIOS, 10 - 10 * RATIOS, UNITS * WEIGHT * (1 - RATIOS), UNITS * CACHE * (1 - RATIOS))


def kept(ratio):
    return np.array([round(UNITS * (1 - ratio))])


def room_of(goal, most=0.6):
    return Room(lambda units: int(units[0]) * WEIGHT, lambda units: int(units[0]) * CACHE, goal, kept(most))


def started(room, *claims, live=0.0):
    for claim in claims:
        room.start(claim, kept(live))
    return claims


def test_room_is_held_a_little_ahead_and_never_beyond_what_may_be_made():
    claim = Claim(100, 400)
    booked = [claim.booked]
    for cached in range(100, 400):
        before = claim.booked
        assert claim.note(cached) == (claim.booked > before)
        booked.append(claim.booked)
        assert min(400, cached + 64) <= claim.booked <= min(400, cached + 128)
    assert booked == sorted(booked) and len(set(booked)) <= 6  # seldom
    assert Claim(10, 14).booked == 14


def test_what_may_ever_be_taken_must_fit_at_the_largest_ratio():
    room = room_of(UNITS * WEIGHT * 0.4 + 1000 * UNITS * CACHE * 0.4)
    assert room.most_tokens() == 1000 and room.least(1000) == room.goal
    started(room, Claim(10, 600))
    assert room.can_ever_fit(Claim(10, 400)) and not room.can_ever_fit(Claim(10, 401))
    room.running.clear()
    assert room.can_ever_fit(Claim(10, 401))


def test_a_request_of_its_own_ratio_brings_weights_of_its_own():
    room = room_of(UNITS * WEIGHT)
    assert room.most_tokens(kept(0.0)) == 0 and room.most_tokens(kept(0.5)) == 1000
    assert not room.can_ever_fit(Claim(10, 20, own=kept(0.0)))
    (own,) = started(room, Claim(10, 20, own=kept(0.2)))
    assert room.in_use(kept(0.6)) == (800 * WEIGHT, 10 * 800 * CACHE)
    load = room.load(1.0)
    assert (load.tokens, load.own_weights, load.own_caches) == (0, 800 * WEIGHT, own.booked * 800 * CACHE)


def test_who_comes_first_starts_first():
    room, first, second = room_of(1), Claim(10, 300), Claim(10, 20)
    started(room, Claim(10, 99), live=0.6)
    room.goal = room.least(99 + 250)
    room.waiting.extend([first, second])
    assert not room.may_start(first, kept(0.6)) and not room.may_start(second, kept(0.6))
    room.waiting.remove(first)
    assert room.may_start(second, kept(0.6)) and not room.may_start(second, kept(0.0))


def test_one_starts_only_when_the_others_have_come_to_the_smaller_size():
    room = room_of(int(UNITS * WEIGHT * 0.6))
    (other,) = started(room, Claim(10, 20), live=0.2)
    new = Claim(10, 20)
    room.waiting.append(new)
    assert room.holds(kept(0.5)) and not room.may_start(new, kept(0.5))
    other.kept = kept(0.5)
    assert room.may_start(new, kept(0.5))


def test_without_a_goal_there_is_room_for_everything():
    room, claim = Room(lambda units: 10**12, lambda units: 10**12), Claim(10**6, 10**9)
    room.waiting.append(claim)
    assert room.may_start(claim, kept(0.0)) and room.holds(kept(0.0)) and room.most_tokens() is None


# --- under a steady load ---


@dataclass
class Request:
    claim: Claim
    left: int
    prefill: int = 0


@dataclass
class Simulated:
    """A server of four threads, each of which makes a token in a tick, and its controller, which looks every ten ticks."""

    goal: Goal
    room: Room
    state: State = State(0.0)
    changes: list = field(default_factory=list)
    running: list = field(default_factory=list)
    waiting: list = field(default_factory=list)
    most_used: int = 0
    pauses: int = 0

    def go(self, to, now):
        if to.ratio < self.state.ratio and not self.room.is_settled(kept(self.state.ratio)):
            return
        while to.ratio < self.goal.high and not self.room.holds(kept(to.ratio)):
            to = State(min(self.goal.high, to.ratio + LEAST))
        if to.ratio != self.state.ratio:
            self.changes.append((now, to.ratio))
        self.state = to

    def rise(self, now):
        self.go(rise(self.state, self.room.load(1.0), self.goal, COSTS)[0], now)

    def see(self):
        self.most_used = max(self.most_used, sum(self.room.in_use(kept(self.state.ratio))))

    def tick(self, now):
        if now % 10 == 0:
            self.go(step(self.state, self.room.load(1.0), self.goal, COSTS)[0], now)
        for request in list(self.running):
            claim = request.claim
            if request.prefill:  # a step that began at the size of then
                request.prefill -= 1
                continue
            live = kept(self.state.ratio)
            claim.paused = claim.paused and not self.room.may_go_on(claim, live)
            if claim.paused and not self.room.must_come(claim, live):
                self.pauses += 1
                continue
            claim.kept = kept(self.state.ratio)
            if claim.note(claim.cached + 1):
                claim.paused = True
                self.rise(now)
            request.left -= 1
            self.see()
            if not request.left:
                self.running.remove(request)
                self.room.running.remove(request.claim)
        while self.waiting and len(self.running) < 4:
            first = self.waiting[0]
            self.room.waiting.append(first.claim)
            self.rise(now)
            starts = self.room.may_start(first.claim, kept(self.state.ratio))
            self.room.waiting.clear()
            if not starts:
                break
            self.room.start(first.claim, kept(self.state.ratio))
            self.running.append(self.waiting.pop(0))
            self.see()


def test_a_goal_that_leaves_little_room_lets_requests_wait_and_is_kept():
    server, came, done = simulated(0, 30, minutes=4, goal=UNITS * WEIGHT * 0.4 + 900 * UNITS * CACHE * 0.4)
    assert server.most_used <= server.goal.memory and done > 30 and came - done > 30  # one at a time


@pytest.mark.parametrize("share", [0.8, 0.87, 0.95])
def test_who_needs_more_waits_while_another_s_long_step_is_at_the_larger_size(share):
    goal = int(UNITS * WEIGHT * share)
    server = Simulated(Goal(None, goal, 0.0, 0.6), room_of(goal))
    server.waiting = [Request(Claim(20, 532), 510), Request(Claim(400, 450), 40, 600)]
    for now in range(1500):
        server.tick(now)
    assert server.most_used <= goal and server.pauses > 10
    assert not server.running and not server.waiting


def test_two_that_wait_for_each_other_go_on_one_after_the_other():
    room, claims = room_of(int(UNITS * WEIGHT * 0.9) + 2 * 130 * UNITS * CACHE), [Claim(10, 900), Claim(10, 900)]
    started(room, *claims, live=0.1)
    live = kept(0.3)
    assert all(claim.note(128) for claim in claims) and room.holds(live)
    claims[0].paused = True
    assert not room.may_go_on(claims[0], live) and not room.must_come(claims[0], live)  # the other may take what it booked
    claims[1].paused = True
    assert not any(room.may_go_on(claim, live) for claim in claims)
    assert [room.must_come(claim, live) for claim in claims] == [True, False]
    claims[0].kept = live
    assert [room.must_come(claim, live) for claim in claims] == [False, True]
    claims[1].kept = live
    assert all(room.may_go_on(claim, live) for claim in claims)


@pytest.mark.parametrize("own", [None, 0.0])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_three_that_wait_for_each_other_all_go_on_within_the_goal(own, order):
    """Whoever is asked first, as often as it likes."""
    weight = 20 * WEIGHT
    room = Room(lambda units: int(units[0]) * weight, lambda units: int(units[0]) * CACHE, 0, kept(0.6))
    room.goal = UNITS * weight + 3 * 128 * UNITS * CACHE + 1000
    claims, ratio = [Claim(10, 700) for _ in range(3)], 0.0
    if own is not None:  # brings its weights for as long as it runs, and makes no room for others
        claims.append(Claim(10, 100, own=kept(own)))
        room.goal += 100 * UNITS * CACHE
    started(room, *claims)
    for claim in claims[:3]:
        assert claim.note(64)
        claim.paused = True
    while not room.holds(kept(ratio)):
        ratio += LEAST
    for claim in claims[3:]:
        claim.paused = True
    while claims:
        live = kept(ratio)
        asked = [claims[at] for at in order if at < len(claims)] + claims[3:]
        for claim in asked:
            claim.paused = claim.paused and not room.may_go_on(claim, live)
            if not claim.paused or room.must_come(claim, live):
                break
        else:
            pytest.fail("none may go on")
        claim.kept = live if claim.own is None else claim.own
        if claim.note(claim.cached + 1):
            claim.paused = True
            while ratio < 0.6 and not room.holds(kept(ratio)):
                ratio = min(0.6, ratio + LEAST)
        assert sum(room.in_use(kept(ratio))) <= room.goal
        if claim.cached >= min(400, claim.most - 1):
            claims.remove(claim)
            room.running.remove(claim)


def simulated(seed, every, minutes=10, goal=UNITS * WEIGHT * 0.8, most=512):
    """Ticks are 50 ms; requests come at random, about so many ticks apart, and answer far less than they may."""
    rng, goal = np.random.default_rng(seed), int(goal)
    server, came, done = Simulated(Goal(None, goal, 0.0, 0.6), room_of(goal)), 0, 0
    for now in range(minutes * 1200):
        if rng.random() < 1 / every and len(server.waiting) < 32:
            prompt = int(rng.integers(10, 200))
            server.waiting.append(Request(Claim(prompt, prompt + most), int(min(most, rng.geometric(1 / 80)))))
            came += 1
        before = len(server.running) + len(server.waiting)
        server.tick(now)
        done += before - len(server.running) - len(server.waiting)
    return server, came, done


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("every", [30, 100, 400])
def test_under_a_steady_random_load_the_goal_is_kept_and_the_ratio_hardly_moves(seed, every):
    server, came, done = simulated(seed, every)
    steady = [at for at, _ in server.changes if at >= 1200]  # the first minute finds where to stand
    assert server.most_used <= server.goal.memory
    assert len(steady) <= 4 * 9  # a few a minute
    assert done >= came - 40 and max(ratio for _, ratio in server.changes) < 0.6  # what is never used does not pin the ratio
