"""What needs no Ray: a stand-in runs actors in this process, one call at a time. The real one is in test_ray_nodes.py."""

import importlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
from contextlib import closing
from types import SimpleNamespace

import pytest

from builders import layout, random_mask, refuses
from ppf.errors import DamagedError, InputError, ResourceError
from ppf.llm.engines import ray_cluster
from ppf.llm.engines.ray_cluster import Cluster, Measurer, RayEngine, import_ray, room
from ppf.llm.engines.service import READY, from_line, to_question, to_refusal
from ppf.llm.load import load_model

LAYOUT = layout(layers=1, ffn=40)
MASKS = [random_mask(LAYOUT, seed) for seed in range(12)]
NODE = {"Alive": True, "Resources": {"CPU": 2.0}}


class Died(Exception):
    """Stands in for the base of Ray's errors."""


class Raised(Died):
    """Stands in for an error that the actor's code raised."""

    cause = ResourceError("the model must be there; it is not; copy it")


class StandIn:
    """Ray as far as the engine uses it. A call is carried out when its answer is fetched.

    Args:
        behave: Given the actor's number and a question, or "open"; gives the answer or raises.
    """

    exceptions = SimpleNamespace(RayError=Died, RayTaskError=Raised)
    connected = False

    def __init__(self, behave, nodes=(NODE,)):
        self.behave, self._nodes, self.actors, self.alive, self.shut, self.turn = behave, nodes, 0, set(), 0, 0
        self._private = SimpleNamespace(worker=SimpleNamespace())

    def init(self, **given):
        self.given = given

    def is_initialized(self):
        return self.connected

    def nodes(self):
        return self._nodes

    def get_runtime_context(self):
        return SimpleNamespace(gcs_address="10.0.0.1:6379")

    def put(self, data):
        return data

    def remote(self, kind):
        assert kind is Measurer
        return self

    def options(self, **options):
        self.asked = options
        return SimpleNamespace(remote=self._actor)

    def _actor(self):
        self.actors += 1
        number = self.actors
        self.alive.add(number)
        call = SimpleNamespace(remote=lambda *words: (number, words))
        return SimpleNamespace(number=number, open=call, answer=call)

    def wait(self, answers, num_returns, timeout):
        assert len(set(answers)) == len(answers) and num_returns == 1
        self.turn += 1
        return [answers[self.turn % len(answers)]], answers

    def get(self, answer):
        number, words = answer
        return self.behave(number, "open" if len(words) == 2 else words[0])

    def kill(self, actor):
        self.alive.discard(actor.number)

    def shutdown(self):
        self.shut += 1


def good(number, question):
    return (
        READY if question == "open" else json.dumps({"log_ppl": 2.5, "kl": 0.25, "tokens": 7, "seconds": 0.5, "reason": question})
    )


@pytest.fixture
def engine_of(monkeypatch, tmp_path):
    """Makes an engine on a stand-in."""
    (tmp_path / "text").write_bytes(b"text")

    def make(ray, workers=2, gpus=0.0, address="10.0.0.1:6379"):
        monkeypatch.setattr(importlib, "import_module", lambda name: ray)
        monkeypatch.setattr(ray_cluster.socket, "create_connection", lambda *_, **__: SimpleNamespace(close=lambda: None))
        cluster = Cluster(address, workers, gpus)
        return closing(RayEngine("ref-a", "d", tmp_path / "text", LAYOUT, "float32", 4096, cluster))

    return make


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_each_mask_is_answered_once_with_its_own_result(engine_of, workers):
    ray = StandIn(good)
    with engine_of(ray, workers) as engine:
        for count in (12, 0, 3):
            found = list(engine.measure(MASKS[:count], "test", [1, 2]))
            assert sorted(index for index, _ in found) == list(range(count))
            assert all(result.reason == to_question(MASKS[index], "test", [1, 2]) for index, result in found)
    assert ray.actors == workers and not ray.alive and ray.shut == 1


def test_a_dead_worker_is_replaced_and_its_mask_measured_again(engine_of):
    def behave(number, question):
        if number <= 3 and question != "open":
            raise Died("its node has gone")
        return good(number, question)

    with engine_of(ray := StandIn(behave), 2) as engine:
        assert sorted(index for index, _ in engine.measure(MASKS)) == list(range(12))
        assert ray.alive == {4, 5}


def test_a_poison_mask_fails_after_three_tries_with_last_words(engine_of):
    poison, tries = to_question(MASKS[5], "search", None), []

    def behave(number, question):
        if question == poison:
            tries.append(number)
            raise Died("no more\nmemory")
        return good(number, question)

    with engine_of(StandIn(behave)) as engine:
        found = dict(engine.measure(MASKS))
    assert len(tries) == 3 and len(set(tries)) == 3 and sorted(found) == list(range(12))
    assert math.isnan(found[5].kl) and "3 times" in found[5].reason and "no more memory" in found[5].reason
    assert all(result.kl == 0.25 for index, result in found.items() if index != 5)


@pytest.mark.parametrize(("error", "starts"), [(Raised(), 1), (Died("killed"), 3)])
def test_a_worker_that_cannot_start_ends_the_measuring(engine_of, error, starts):
    def behave(number, question):
        raise error

    with engine_of(ray := StandIn(behave), 1) as engine, refuses(ResourceError) as caught:
        list(engine.measure(MASKS))
    assert ray.actors == starts and ("model must be there" if starts == 1 else "killed") in str(caught.value)
    assert not ray.alive and ray.shut == 1


def test_what_a_worker_refuses_ends_the_measuring_at_once(engine_of):
    def behave(number, question):
        return to_refusal(InputError("a; b; c")) if question != "open" else READY

    with engine_of(ray := StandIn(behave), 2) as engine, refuses(InputError) as caught:
        list(engine.measure(MASKS))
    assert str(caught.value) == "a; b; c" and ray.actors == 2 and not ray.alive and ray.shut == 1


@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_a_cluster_to_which_this_process_is_connected_is_used_and_left_alone(engine_of, monkeypatch, address):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    ray = StandIn(good)
    ray.connected = True
    with engine_of(ray, 2, address=address) as engine:
        assert len(list(engine.measure(MASKS))) == 12 and engine.where == "Ray at 10.0.0.1:6379, workers: 2"
    assert not hasattr(ray, "given") and ray.shut == 0 and not ray.alive


@pytest.mark.parametrize("address", ["10.0.0.2:6379", "10.0.0.1:6380"])
def test_the_address_of_another_cluster_than_the_one_connected_to_is_refused(engine_of, address):
    ray = StandIn(good)
    ray.connected = True
    with refuses(InputError) as caught, engine_of(ray, address=address):
        pytest.fail("masks would be measured elsewhere")
    assert address in str(caught.value) and "10.0.0.1:6379" in str(caught.value) and ray.actors == ray.shut == 0


def test_a_cluster_that_places_no_worker_is_said(engine_of, monkeypatch):
    ray = StandIn(good)
    monkeypatch.setattr(ray, "wait", lambda answers, num_returns, timeout: ([], answers) if timeout else None)
    with engine_of(ray) as engine, refuses(ResourceError):
        list(engine.measure(MASKS))


# --- the cluster ---


@pytest.mark.parametrize(
    ("resources", "gpus", "fits"),
    [
        ([{"CPU": 2.0}, {"CPU": 3.0}], 0, 5),
        ([{"CPU": 8.0, "GPU": 2.0}, {"CPU": 1.0, "GPU": 4.0}, {"CPU": 4.0}], 1.0, 3),
        ([{"CPU": 8.0, "GPU": 2.0}], 0.5, 4),
        ([{"CPU": 8.0, "GPU": 3.0}], 0.75, 3),
        ([{"CPU": 4.0}, {"memory": 1.0}], 1.0, 0),
        ([], 0, 0),
    ],
)
def test_how_many_workers_fit(resources, gpus, fits):
    nodes = [{"Alive": True, "Resources": each} for each in resources]
    assert room([*nodes, {"Alive": False, "Resources": {"CPU": 64.0, "GPU": 8.0}}], gpus) == fits


@pytest.mark.parametrize("address", ["10.0.0.1:6379", None])
def test_ray_is_quiet_private_and_as_large_as_asked(engine_of, address, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with engine_of(ray := StandIn(good), None if address else 3, address=address) as engine:
        assert len(engine.workers) == (2 if address else 3)
        assert "10.0.0.1:6379" in engine.where
    assert ray.given["log_to_driver"] is False and os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    if address:
        assert ray.given["address"] == address
    else:
        assert (ray.given["address"], ray.given["include_dashboard"], ray.given["num_cpus"]) == ("local", False, 3)
    assert (ray.asked["max_restarts"], ray.asked["num_gpus"]) == (0, 0.0)


def test_a_cluster_without_the_gpu_is_refused(engine_of):
    ray = StandIn(good)
    with refuses(ResourceError) as caught, engine_of(ray, gpus=1.0):
        pytest.fail("there is no GPU")
    assert "1 GPU" in str(caught.value) and ray.shut == 1


def test_a_cluster_that_does_not_answer_is_said_at_once(engine_of, monkeypatch):
    ray = StandIn(good)
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("Version mismatch: ray 2.9\nhere 2.60")))
    with refuses(ResourceError) as caught, engine_of(ray):
        pytest.fail("versions differ")
    assert "Version mismatch" in str(caught.value)
    monkeypatch.undo()
    ray.init = None
    with refuses(ResourceError) as caught:
        ray_cluster._connect(ray, Cluster("127.0.0.1:1", 1, 0.0))
    assert "127.0.0.1:1" in str(caught.value)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with refuses(ResourceError) as caught:
        import_ray(None)
    assert "pip install 'ppf[ray]'" in str(caught.value)


def test_a_ray_of_our_own_that_lets_everyone_in_is_refused(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: StandIn(good))
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with refuses(InputError):
        import_ray(None)
    import_ray("10.0.0.1:6379")  # that cluster is its owner's affair


def test_nothing_of_ray_is_imported_without_being_asked_for():
    code = "import sys, ppf.commands, ppf.recipes.fit, ppf.llm.engines.ray_cluster; print('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"


# --- what runs on a node ---


def setup_of(folder, of, **changes):
    settings = {
        "folder": str(folder), "digest": load_model(str(folder)).digest, "layout": of.to_json(), "dtype": "float32",
        "device": "cpu", "tokens_per_batch": 4096, "version": importlib.metadata.version("ppf"),
    }  # fmt: skip
    return json.dumps(settings | changes)


def test_a_node_measures_what_it_is_asked(real):
    folder, text, of = real
    measurer = Measurer()
    assert measurer.open(setup_of(folder, of), text.read_bytes()) == READY
    results = [from_line(measurer.answer(to_question(random_mask(of, seed), "search", None))) for seed in range(2)]
    assert all(math.isfinite(result.kl) and result.tokens == 72 for result in results) and results[0].kl != results[1].kl
    with refuses(InputError):
        from_line(measurer.answer(to_question(random_mask(LAYOUT), "search", None)))


@pytest.mark.parametrize("change", [{"digest": "0" * 32}, {"version": "0.0.0"}])
def test_a_node_with_another_model_or_version_says_so(real, change):
    folder, text, of = real
    with refuses(DamagedError):
        from_line(Measurer().open(setup_of(folder, of, **change), text.read_bytes()))
