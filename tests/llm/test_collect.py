import math
from collections import Counter
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import LAYOUTS, examples, importance, layout, refuses
from ppf.errors import DamagedError, InputError, ResourceError
from ppf.llm.collect import Failures, Wanted, collect, probes, spread, stratified_ratios
from ppf.samples import Measurement, Sample, SampleStore
from ppf.space.allocation import Allocation
from ppf.space.mask import select
from ppf.space.policy import Policy

LAYOUT = layout(layers=2, ffn=40)
ORDER = importance(LAYOUT)
LEVELS = (0.75, 0.5, 0.25, 0)


class Lab:
    """An engine that answers from the mask alone, out of order, and stops where it is told."""

    def __init__(self, stop=10**9, reasons=None):
        self.stop, self.reasons, self.measured, self.asked = stop, reasons or {}, [], 0

    def __call__(self):
        self.asked += 1
        return self

    def measure(self, masks):
        for count, index in enumerate(reversed(range(len(masks)))):
            if count == self.stop:
                raise KeyboardInterrupt
            self.measured.append(masks[index].digest)
            yield index, self.reasons.get(index, answer(masks[index]))


def answer(mask):
    kept = int(mask.allocation.kept @ LAYOUT.costs)
    return Measurement(1e4 / kept, 1e3 / kept, 4096, 0.5)


def wanted(count=8, purpose="spread"):
    centres = [(ratio, Policy.uniform(LAYOUT)) for ratio in np.linspace(0.1, 0.5, count)]
    return spread(LAYOUT, centres, [0.2], purpose, np.random.default_rng(0))


def opened(path):
    return closing(SampleStore(path, "c", write=True))


def gather(store, lab, items, **options):
    told = []
    settings = {"round": 2, "advance": told.append, **options}
    try:
        found = list(collect(lab, store, items, ORDER, LAYOUT, **settings))
    except KeyboardInterrupt:
        found = None
    return found, told


def digests(items):
    return [select(item.allocation, ORDER, LAYOUT).digest for item in items]


# --- what to measure ---


@pytest.mark.parametrize("name", LAYOUTS)
def test_probes_shrink_each_site_alone_to_each_level(name):
    of = LAYOUTS[name]
    found = probes(of, LEVELS)
    places = [np.flatnonzero(item.allocation.kept != of.units) for item in found]
    assert [len(place) for place in places] == [1] * len(found) and sorted(place[0] for place in places) == [
        place[0] for place in places
    ]
    for index, site in enumerate(of.sites):
        kept = [int(item.allocation.kept[index]) for item, place in zip(found, places, strict=True) if place[0] == index]
        levels = {max(site.floor, round(level * site.units)) for level in LEVELS} - {site.units}
        assert kept == sorted(levels, reverse=True) and kept[-1] == site.floor
    for item in found:
        assert item.purpose == "probe"
        assert item.ratio == pytest.approx(1 - item.allocation.kept @ of.costs / of.prunable)


def test_sites_that_cannot_shrink_are_not_probed():
    one = layout(layers=1, heads=2, groups=1, ffn=1)
    assert probes(one, LEVELS) == []
    assert [item.allocation.kept.tolist() for item in probes(layout(layers=1, groups=2, ffn=1), LEVELS)] == [[1, 1]]


@examples(30)
@given(st.sampled_from(sorted(LAYOUTS)), st.floats(0, 0.85), st.floats(0, 3), st.integers(0, 99))
def test_a_spread_mask_meets_its_ratio_however_wild(name, ratio, scale, seed):
    of, rng = LAYOUTS[name], np.random.default_rng(seed)
    centre = Policy(rng.random(len(of.sites)))
    [item] = spread(of, [(ratio, centre)], [scale], "search", rng)
    removed = (of.units - item.allocation.kept) @ of.costs
    assert math.ceil(ratio * of.prunable - 1e-6) <= removed < ratio * of.prunable + of.costs.min()
    assert (item.purpose, item.ratio) == ("search", ratio)
    assert (item.allocation.kept >= of.floors).all() and (item.allocation.kept <= of.units).all()


def test_scales_are_used_in_turn_and_the_seed_decides():
    centres = [(0.4, Policy.uniform(LAYOUT))] * 200

    def draw(seed, scales):
        return [item.allocation.kept for item in spread(LAYOUT, centres, scales, "spread", np.random.default_rng(seed))]

    tame, wild = np.array(draw(0, [0, 0.5]))[::2], np.array(draw(0, [0, 0.5]))[1::2]
    assert (tame == tame[0]).all() and (wild[:, 1::2].std(axis=0) > 2).all()
    assert np.array_equal(draw(1, [0.2]), draw(1, [0.2])) and not np.array_equal(draw(1, [0.2]), draw(2, [0.2]))


def test_a_ratio_beyond_the_floors_is_refused():
    with refuses(InputError):
        spread(LAYOUT, [(0.999, Policy.uniform(LAYOUT))], [0.1], "spread", np.random.default_rng(0))


@examples(50)
@given(st.floats(0, 0.5), st.floats(0.5, 0.95), st.integers(0, 60), st.integers(0, 99))
def test_there_is_one_ratio_in_each_stratum(low, high, count, seed):
    ratios = stratified_ratios(low, high, count, np.random.default_rng(seed))
    width = (high - low) / max(count, 1)
    assert len(ratios) == count
    assert (np.abs(np.sort(ratios) - low - (np.arange(count) + 0.5) * width) <= width / 2 + 1e-9).all()


# --- measuring ---


def test_samples_say_what_was_wanted_and_what_came(tmp_path):
    items = wanted()
    with opened(tmp_path / "s") as store:
        found, told = gather(store, lab := Lab(), items)
        assert store.all() == found == told and lab.asked == 1
        by_digest = {sample.digest: sample for sample in found}
        for item, digest in zip(items, digests(items), strict=True):
            sample, expected = by_digest[digest], answer(select(item.allocation, ORDER, LAYOUT))
            assert (sample.kept, sample.ratio) == (tuple(item.allocation.kept.tolist()), item.ratio)
            assert (sample.purpose, sample.round, sample.context) == ("spread", 2, "c")
            assert (sample.log_ppl, sample.kl, sample.tokens, sample.status) == (expected.log_ppl, expected.kl, 4096, "done")


def test_what_the_store_has_is_not_measured_again(tmp_path):
    items = wanted()
    with opened(tmp_path / "s") as store:
        first, _ = gather(store, Lab(), items[2:5])
        found, told = gather(store, lab := Lab(), items, round=3)
        assert sorted(lab.measured) == sorted(digests(items[:2] + items[5:]))
        assert [sample.digest for sample in found[:3]] == digests(items[2:5]) and found == told
        assert {sample.round for sample in found[:3]} == {2} and {sample.round for sample in found[3:]} == {3}
        again, _ = gather(store, nobody := Lab(), items)
        assert nobody.asked == 0 and [sample.digest for sample in again] == digests(items)
        assert Counter(again) == Counter(found) and len(first) == 3


def test_a_mask_that_is_wanted_twice_is_measured_and_given_once(tmp_path):
    items = wanted(4)
    twice = [*items, Wanted(items[1].allocation, "search", 0.9), *items]
    with opened(tmp_path / "s") as store:
        fresh, told = gather(store, lab := Lab(), twice)
        assert Counter(lab.measured) == Counter(digests(items)) and len(told) == 4
        assert {sample.purpose for sample in fresh} == {"spread"}
        again, _ = gather(store, Lab(), twice)
        assert Counter(again) == Counter(fresh)


@pytest.mark.parametrize("stop", range(9))
def test_a_stop_at_any_moment_loses_nothing_and_repeats_nothing(tmp_path, stop):
    items = wanted()
    with opened(tmp_path / "s") as store:
        found, told = gather(store, first := Lab(stop=stop), items)
        assert (found is None) is (stop < 8) and store.all() == told and len(told) == min(stop, 8)
    with opened(tmp_path / "s") as store:
        assert store.all() == told
        resumed, _ = gather(store, second := Lab(), items)
        assert Counter(first.measured + second.measured) == Counter(digests(items))
        assert {sample.digest: sample.log_ppl for sample in resumed} == {
            digest: answer(select(item.allocation, ORDER, LAYOUT)).log_ppl
            for item, digest in zip(items, digests(items), strict=True)
        }


def test_each_sample_is_in_the_store_before_it_is_told(tmp_path):
    with opened(tmp_path / "s") as store:
        gather(
            store, Lab(), wanted(), advance=lambda sample: [store.get(sample.digest)] == [sample] or pytest.fail("not yet there")
        )
        for count, sample in enumerate(collect(Lab(), store, wanted(12), ORDER, LAYOUT, 0, lambda _: None)):
            assert store.get(sample.digest) == sample
            if count == 9:
                break
        assert len({*digests(wanted()), *digests(wanted(12))}) > len(store.all()) >= 10


def test_failures_are_kept_with_their_reasons(tmp_path):
    reasons = {
        1: Measurement(math.nan, math.nan, 0, 0.0, "its worker died 3 times"),
        4: Measurement(math.inf, 0.5, 4096, 1.0),
    }
    items = wanted()
    with opened(tmp_path / "s") as store:
        found, _ = gather(store, Lab(reasons=reasons), items)
        failed = {sample.digest: sample for sample in store.failed()}
        assert set(failed) == {digests(items)[1], digests(items)[4]} and len(store.all()) == 6
        assert failed[digests(items)[1]].reason == "its worker died 3 times"
        assert "inf" in failed[digests(items)[4]].reason
        assert Counter(sample.status for sample in found) == {"done": 6, "failed": 2}


def test_what_failed_is_measured_again(tmp_path):
    items, failure = wanted(), Measurement(math.nan, math.nan, 0, 0.0, "too little memory")
    with opened(tmp_path / "s") as store:
        gather(store, Lab(reasons={1: failure, 4: failure}), items)
        found, told = gather(store, lab := Lab(reasons={0: failure}), items)
        assert lab.measured == [digests(items)[4], digests(items)[1]] and len(found) == len(told) == 8
        assert [sample.digest for sample in store.failed()] == [digests(items)[1]]
        assert len(store.all()) == 7


def test_nothing_wanted_asks_nobody(tmp_path):
    with opened(tmp_path / "s") as store:
        assert gather(store, lab := Lab(), []) == ([], []) and lab.asked == 0


def test_an_allocation_names_its_mask_by_importance(tmp_path):
    item = Wanted(Allocation(LAYOUT.floors), "refine", 0.9)
    with opened(tmp_path / "s") as store:
        [sample], _ = gather(store, Lab(), [item])
        mask = select(item.allocation, ORDER, LAYOUT)
        assert (sample.mask, sample.digest) == (mask.pack(), mask.digest)


def judged(statuses, reason="not finite: log-perplexity nan, KL nan"):
    one, failures = wanted()[0], Failures()
    good = Sample.of(select(one.allocation, ORDER, LAYOUT), "c", one.purpose, one.ratio, 0, Measurement(2.5, 0.1, 9, 1.0))
    bad = replace(good, status="failed", reason=reason)
    for status in statuses:
        failures.count(good if status else bad)


def test_a_run_in_which_more_than_a_fifth_fails_is_ended():
    judged([False] * 10)
    judged([False] * 10 + [True] * 50 + [False] * 10)
    for statuses in ([False] * 11, [True] * 39 + [False] * 11, [False, True, True] * 20):
        with refuses(DamagedError) as caught:
            judged(statuses)
        assert "11 of the latest" in str(caught.value) and "not finite" in str(caught.value)
    with refuses(ResourceError) as caught:
        judged([False] * 11, "too little memory")
    assert "too little memory" in str(caught.value)
