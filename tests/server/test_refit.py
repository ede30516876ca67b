import asyncio
import contextlib
import json
import shutil
import threading
import time
from dataclasses import replace
from functools import partial

import pytest

import ppf.study
from builders import importance, refuses
from http_client import request, strict
from ppf.artifact import read_json, write_json
from ppf.config import Target
from ppf.decide import Decider
from ppf.errors import DamagedError, InputError, ResourceError
from ppf.server import refit
from ppf.study import StudyFolder, mark_of
from server_runs import asking, fit_anew, running


@pytest.fixture
def own(study, tmp_path, monkeypatch):
    """A copy of the study, to be fitted anew; servers look often."""
    monkeypatch.setattr(refit, "_LOOK_SECONDS", 0.05)
    return StudyFolder(shutil.copytree(study, tmp_path / "own"))


def get(port, path):
    status, _, body = request(port, "GET", path)
    assert status == 200, body
    return strict(body)


def kept(record):
    return [entry["kept"] for entry in record["kept"]]


def library(study, ratio, nested=False):
    return Decider(study.folder).decide(Target(ratio=ratio, nested=nested)).allocation.kept.tolist()


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# --- reading a study that changes ---


def test_a_decider_needs_nothing_of_the_folder_once_it_is_open(own):
    decider = Decider(own.folder)
    expected = [library(own, 0.4, nested) for nested in (False, True)]
    fit_anew(own, 0.8)
    for nested, wanted in zip((False, True), expected, strict=True):
        assert decider.decide(Target(ratio=0.4, nested=nested)).allocation.kept.tolist() == wanted
    assert library(own, 0.4, True) != expected[1] and mark_of(own.folder) != decider.mark
    shutil.rmtree(own.folder)
    assert mark_of(own.folder) is None and decider.report["heldout"]["additive"]["tau_mean"] == 0.9


@pytest.mark.parametrize("moment", ["predictor", "agent", "nested"])
def test_a_reader_that_meets_the_replacing_of_files_has_one_fit_or_is_told_to_wait(own, monkeypatch, moment):
    """It takes nothing for damaged that is only being replaced."""
    path, asked = StudyFolder.path, []

    def begin():
        (own.folder / "report.json").unlink()
        own.path("nested").write_bytes(b"half")

    def replacing(self, artefact):
        asked.append(artefact)
        if asked.count(moment) == 2:  # the first time it is looked for only
            asked.append(moment)
            happens()
        return path(self, artefact)

    monkeypatch.setattr(StudyFolder, "path", replacing)
    happens = partial(fit_anew, own, 0.8)
    decider = Decider(own.folder)
    assert decider.mark == mark_of(own.folder) and decider.report["heldout"]["additive"]["tau_mean"] == 0.5
    for nested in (False, True):
        assert decider.decide(Target(ratio=0.4, nested=nested)).allocation.kept.tolist() == library(own, 0.4, nested)
    asked.clear()
    happens = begin
    with refuses(InputError) as caught:
        Decider(own.folder)
    assert "has not ended" in str(caught.value)


def test_a_study_that_never_rests_is_refused(own, monkeypatch):
    marks = iter(range(100))
    monkeypatch.setattr(ppf.study, "mark_of", lambda _: (next(marks), 0, 0))
    with refuses(DamagedError):
        Decider(own.folder)


# --- serving one ---


def test_while_a_fit_runs_the_last_policies_are_served_and_then_the_new_ones(own, caplog):
    before = [library(own, 0.4, nested) for nested in (False, True)]
    with running(own.folder, no_model=True) as (port, _):
        report = read_json(own.folder / "report.json")
        (own.folder / "report.json").unlink()
        until(lambda: "is being fitted" in caplog.text)
        for path in ("agent", "nested", "predictor"):
            own.path(path).write_bytes(b"half")
        assert kept(get(port, "/api/policy?ratio=0.4")) == before[0]
        assert kept(get(port, "/api/policy?ratio=0.4&nested=true")) == before[1]
        assert get(port, "/api/study")["predictor"]["heldout"]["tau_mean"] == 0.9
        write_json(own.folder / "report.json", report)  # the report is there, and yet nothing else is whole
        until(lambda: "still served: " in caplog.text)
        assert kept(get(port, "/api/policy?ratio=0.4")) == before[0] and get(port, "/api/state")["fits"] == 1
    assert "Traceback" not in caplog.text and len(caplog.records) == 2


def test_a_study_that_has_gone_and_comes_back_is_no_other_fit(own, caplog):
    away = own.folder.with_name("away")
    with running(own.folder, no_model=True) as (port, _):
        before = get(port, "/api/state")
        own.folder.rename(away)
        until(lambda: "has gone" in caplog.text)
        time.sleep(0.2)
        away.rename(own.folder)
        time.sleep(0.3)
        assert get(port, "/api/state") == before and len(caplog.records) == 1


def test_a_swap_fails_no_request_and_every_answer_is_of_one_fit(own, caplog):
    paths = [f"/api/policy?ratio=0.4&nested={nested}" for nested in ("false", "true")] + ["/api/study"]
    answers = [[library(own, 0.4, nested) for nested in (False, True)]]
    told = {}
    with running(own.folder, no_model=True) as (port, _), asking(port, paths) as (failed, answered):
        for fit in (2, 3, 4):
            fit_anew(own, 0.8 if fit % 2 == 0 else 0.2)
            answers.append([library(own, 0.4, nested) for nested in (False, True)])
            until(lambda fit=fit: get(port, "/api/state")["fits"] == fit)
            assert [kept(get(port, path)) for path in paths[:2]] == answers[-1]
            assert get(port, "/api/study")["predictor"]["heldout"]["tau_mean"] == 0.5
            told |= {get(port, path)["fit"]: fit for path in [*paths, "/api/state"]}
    known = [tuple(one) for pair in answers for one in pair]
    assert sorted(told.values()) == [2, 3, 4]
    for one in (one for one in answered if "kept" in one and one["fit"] in told):
        assert kept(one) in answers[told[one["fit"]] - 1]
    assert not failed and len(answered) > 20 and len(set(known)) > 2
    assert {tuple(kept(one)) for one in answered if "kept" in one} <= set(known)
    assert caplog.text.count("its new policies are served from now on") == 3


def test_the_live_model_takes_the_new_policies_and_requests_under_way_go_on(own, caplog, monkeypatch):
    with running(own.folder, max_tokens=40, ratio=0.4) as (port, served):
        at = served.live.elastic.at
        monkeypatch.setattr(served.live.elastic, "at", lambda *view: time.sleep(0.05) or at(*view))
        found = []
        body = {"model": "tiny", "prompt": "w5", "max_tokens": 40, "temperature": 0, "stop": ["never"]}
        following, fixed = (json.dumps({**body, **more}).encode() for more in ({}, {"prune_ratio": 0.2}))
        ask = [threading.Thread(target=lambda one=one: found.append(request(port, "POST", "/v1/completions", one, seconds=30)))
               for one in (following, fixed)]  # fmt: skip
        for thread in ask:
            thread.start()
        until(lambda: len(served.live._jobs) == 2)
        fit_anew(own, 0.8)
        until(lambda: get(port, "/api/state")["fits"] == 2)
        assert served.live.size.decision.asked == 0.4
        assert served.live.size.view.allocation.kept.tolist() == library(own, 0.4)
        for thread in ask:
            thread.join()
    records = [strict(body) for _, _, body in found]
    assert [status for status, _, _ in found] == [200, 200]
    assert sorted(len(record["ppf"]["switches"]) for record in records) in ([0, 0], [0, 1])
    assert len(served.live.costs.ratios) == 6 and "Traceback" not in caplog.text


def test_a_fit_that_the_model_in_memory_cannot_run_is_not_taken(own, caplog):
    with running(own.folder, max_tokens=8) as (port, served):
        before = served.live.size.view.allocation.kept.tolist()
        importance(own.layout, 7).save(own.path("importance"), own.layout)
        fit_anew(own, 0.8)
        until(lambda: "start the server again" in caplog.text)
        assert get(port, "/api/state")["fits"] == 1 and served.live.size.view.allocation.kept.tolist() == before
        with refuses(InputError):
            served.adopt(Decider(own.folder))


def test_what_the_surroundings_kept_from_being_opened_is_tried_again_after_a_pause(own, monkeypatch, caplog):
    monkeypatch.setattr(refit, "_PAUSES", (0.2, 0.4))
    errors = [ResourceError("a file must be readable; too many are open; close some"), MemoryError(), ResourceError("a; b; c")]
    tried, adopted = [], []

    def opened(*_):
        tried.append(time.monotonic())
        if len(tried) <= len(errors):
            raise errors[len(tried) - 1]
        return "decider", {}, mark_of(own.folder)

    monkeypatch.setattr(refit, "_opened", opened)

    async def watched():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(refit.follow(own.folder, (0, 0, 0), False, lambda *given: adopted.append(given)), 1.6)

    asyncio.run(watched())
    pauses = [after - before for before, after in zip(tried, tried[1:], strict=False)]
    assert adopted == [("decider", {})] and len(tried) == 4
    assert all(pause >= least for pause, least in zip(pauses, (0.2, 0.4, 0.4), strict=True)) and sum(pauses) < 1.5
    assert caplog.text.count("cannot be opened now; another try in") == 3 and "Traceback" not in caplog.text


def test_the_controller_takes_the_limits_of_the_new_fit(own):
    with running(own.folder, target_latency_ms=1e6, ratio=0.5) as (port, served):

        def limits():
            return get(port, "/api/state")["controller"]["limits"]

        served.goal = replace(served.goal, low=0.5)  # so that it stays there until the fit
        assert limits()["max_ratio"] == 0.6 and served.live.size.decision.asked == 0.5
        fit_anew(own, 0.8, most=0.3)
        until(lambda: get(port, "/api/state")["fits"] == 2)
        assert limits() == {"min_ratio": 0, "max_ratio": 0.3} and served.live.size.decision.asked <= 0.3
        decision = get(port, "/api/state")["controller"]["decisions"][0]
        assert (decision["from"], decision["to"]) == (0.5, 0.3) and "fitted anew" in decision["reason"]
        fit_anew(own, 0.2, most=0.6)
        until(lambda: get(port, "/api/state")["fits"] == 3)
        assert limits()["max_ratio"] == 0.6


def test_limits_that_were_given_stay(own):
    with running(own.folder, target_latency_ms=1e6, min_ratio=0.1, max_ratio=0.4) as (port, _):
        fit_anew(own, 0.8, most=0.3)
        until(lambda: get(port, "/api/state")["fits"] == 2)
        assert get(port, "/api/state")["controller"]["limits"] == {"min_ratio": 0.1, "max_ratio": 0.4}


def test_a_failure_of_ours_does_not_end_the_watch(own, monkeypatch, caplog):
    adopted, marks = [], iter([(1, 0, 0), (2, 0, 0), (2, 0, 0)])
    monkeypatch.setattr(refit, "mark_of", lambda _: next(marks, (2, 0, 0)))
    monkeypatch.setattr(refit, "_opened", lambda *_: (1 / 0) if not caplog.records else ("decider", {}, (2, 0, 0)))

    async def watched():
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(refit.follow(own.folder, (0, 0, 0), False, lambda *given: adopted.append(given)), 1)

    asyncio.run(watched())
    assert adopted == [("decider", {})] and "could not be opened" in caplog.text
