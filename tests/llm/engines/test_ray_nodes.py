"""A real cluster of two nodes on this machine: `python -m pytest -m ray`."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from builders import random_mask
from ppf.llm.engines import ray_cluster
from ppf.llm.engines.local import LocalEngine
from ppf.llm.engines.ray_cluster import Cluster, RayEngine
from ppf.llm.engines.service import to_question
from ppf.llm.load import load_model

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def nodes():
    """A head that measures nothing, and two nodes with a CPU each."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def engine(nodes, real):
    """Two workers with a small model."""
    folder, text, of = real
    digest = load_model(str(folder)).digest
    with closing(RayEngine(str(folder), digest, text, of, "float32", 4096, Cluster(nodes.address, 2, 0.0))) as engine:
        yield engine


def masks(of, count):
    return [random_mask(of, seed) for seed in range(count)]


def working(engine):
    """The process of a worker that measures, not of one that starts."""
    worker = next(worker for worker in engine.workers if worker.is_ready)
    return worker._ray.get(worker._actor.__ray_call__.remote(lambda actor: os.getpid()))


def test_a_cluster_gives_the_very_results_of_local_processes(engine, real):
    folder, text, of = real
    wanted = masks(of, 20)
    with closing(LocalEngine(folder, text, of, "float32", 1, 4096)) as local:
        for part, rows in (("search", None), ("test", [2, 0])):
            expected, found = dict(local.measure(wanted, part, rows)), dict(engine.measure(wanted, part, rows))
            for index in range(20):
                ours, theirs = found[index], expected[index]
                assert (ours.log_ppl, ours.kl, ours.losses, ours.tokens) == (
                    theirs.log_ppl,
                    theirs.kl,
                    theirs.losses,
                    theirs.tokens,
                )


def test_workers_killed_one_after_the_other_lose_no_mask(engine, real):
    wanted, done = masks(real[2], 200), []
    for index, result in engine.measure(wanted):
        done.append(index)
        assert result.reason == ""
        if len(done) % 16 == 8:
            os.kill(working(engine), signal.SIGKILL)  # twelve of them
    assert sorted(done) == list(range(200))


def test_nodes_lost_while_running_lose_no_mask(nodes, engine, real):
    wanted, done = masks(real[2], 200), []
    for index, result in engine.measure(wanted):
        done.append(index)
        assert result.reason == ""
        if len(done) in (30, 90, 150):
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
            nodes.add_node(num_cpus=1)
    assert sorted(done) == list(range(200))


def test_a_poison_mask_is_named_and_the_rest_is_measured(engine, real, monkeypatch):
    wanted = masks(real[2], 20)
    poison, send, tries = to_question(wanted[7], "search", None), ray_cluster._Actor.send, []

    def deadly(worker, question):
        if question == poison:
            tries.append(worker)
            worker._ray.kill(worker._actor)
        send(worker, question)

    monkeypatch.setattr(ray_cluster._Actor, "send", deadly)
    found = dict(engine.measure(wanted))
    assert len(tries) == 3 and sorted(found) == list(range(20))
    assert [index for index, result in found.items() if result.reason] == [7] and "3 times" in found[7].reason


# --- whole fits ---

SETTINGS = {"samples": 60, "rounds": 0, "calibration-tokens": 512, "search-tokens": 2048, "test-tokens": 512, "seq-len": 256}


def fit(study, *more, **environment):
    """A fit as a process."""
    words = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "ppf", "fit", "ref-a", "--study", str(study), "--score", "magnitude", *words, *more]
    environment = {**os.environ, "RAY_AUTH_MODE": "", **environment}
    environment = {name: value for name, value in environment.items() if value}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def measured(study):
    """Digests and figures at hand."""
    path = study / "samples.sqlite"
    if not path.exists():
        return {}
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        try:
            return {digest: figures for digest, *figures in db.execute("SELECT digest, log_ppl, kl, status FROM samples")}
        except sqlite3.OperationalError:  # its table is not there yet
            return {}


def wait_for(study, count, process):
    deadline = time.monotonic() + 180
    while len(measured(study)) < count and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)


def test_a_fit_whose_driver_is_killed_goes_on_and_equals_a_local_one(nodes, tmp_path):
    before = ray_processes()
    with fit(tmp_path / "local", "--workers", "1") as local:
        wait_for(tmp_path / "local", 5, local)
        assert ray_processes() == before
        _, errors = local.communicate()
        assert local.returncode == 0, errors
    kept = {}
    for count in range(2, 60, 3):
        with fit(tmp_path / "ray", "--engine", "ray", "--ray-address", nodes.address, RAY_AUTH_MODE="disabled") as driver:
            wait_for(tmp_path / "ray", count, driver)
            driver.kill()
        assert driver.returncode == -signal.SIGKILL
        assert kept.items() <= measured(tmp_path / "ray").items()
        kept = measured(tmp_path / "ray")
        assert len(kept) >= count
    with fit(tmp_path / "ray", "--engine", "ray", "--ray-address", nodes.address, RAY_AUTH_MODE="disabled") as driver:
        _, errors = driver.communicate()
        assert driver.returncode == 0, errors
    assert kept.items() <= measured(tmp_path / "ray").items() and measured(tmp_path / "ray") == measured(tmp_path / "local")
    assert not [line for line in errors.splitlines() if "ray" in line.lower() and not line.startswith("Ray at ")]


def ray_processes():
    """Servers of clusters, each as (kind, pid)."""
    found = subprocess.run(["ps", "-eo", "pid=,comm="], capture_output=True, text=True).stdout.splitlines()
    return {(kind, line.split()[0]) for line in found for kind in ("gcs_server", "raylet") if line.endswith(kind)}


ASK = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).internal_kv_put(b"a", b"b", True, None)
print("open to all")
"""


def test_a_ray_of_our_own_asks_for_a_token_prints_where_it_is_and_ends_with_ctrl_c(tmp_path):
    before = ray_processes()
    with fit(tmp_path / "s", "--engine", "ray", "--workers", "1") as driver:
        wait_for(tmp_path / "s", 3, driver)
        started = {kind for kind, _ in ray_processes() - before}
        lines = []
        while not lines or not lines[-1].startswith("Ray at "):
            lines.append(driver.stderr.readline())
        address = lines[-1].split()[2].rstrip(",:")
        stranger = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        asked = subprocess.run([sys.executable, "-c", ASK, address], capture_output=True, text=True, env=stranger)
        driver.send_signal(signal.SIGINT)
        _, errors = driver.communicate(timeout=60)
    assert started == {"gcs_server", "raylet"} and asked.returncode != 0 and "open to all" not in asked.stdout
    assert driver.returncode == 130 and errors.strip().splitlines()[-1].startswith("error: stopped"), errors
    deadline = time.monotonic() + 10
    while ray_processes() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray_processes() == before
