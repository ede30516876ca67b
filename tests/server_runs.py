"""A study of a tiny model with made-up measurements, and servers of it in this process."""

import contextlib
import subprocess
import sys
import threading
import time

import numpy as np

from builders import importance
from http_client import request, strict
from learn_builders import curves_of, probes, spread, truth
from ppf.artifact import write_json
from ppf.config import ServeConfig
from ppf.decide import Decider
from ppf.learn.agent import Agent
from ppf.learn.baselines import knapsack
from ppf.learn.fit_predictor import fit_predictor
from ppf.learn.train_nested import chain_of
from ppf.llm.depth import with_depth
from ppf.llm.load import load_model
from ppf.samples import Measurement, Sample
from ppf.server.app import Service
from ppf.server.run import access_of, listen, server_of
from ppf.server.served import open_served
from ppf.space.allocation import Allocation
from ppf.space.mask import select
from ppf.study import StudyFolder


def study_of(folder, model, depth=False):
    """The folder that a fit of a model leaves, with made-up measurements."""
    folder.mkdir()
    loaded = load_model(str(model))
    layout = with_depth(loaded.model, loaded.layout) if depth else loaded.layout
    of, scores = truth(of=layout), importance(layout)
    record = {
        "model": {"name": str(model), "digest": loaded.digest, "type": layout.model_type, "bytes_per_param": 4},
        "layout": layout.to_json(), "settings": {"text": str(folder / "text.txt"), "test_text": None, "seed": 0},
        "dense": {"search": {"log_ppl": 2.0, "tokens": 100}, "test": {"log_ppl": 2.5, "tokens": 200}},
        "context": "made up", "seq_len": 16, "dtype": "float32",
    }  # fmt: skip
    study = StudyFolder.create(folder, record)
    scores.save(study.path("importance"), layout)
    samples = probes(of) + spread(of, 12)
    fit_predictor("additive", samples, [], layout, 2.0, 0).save(study.path("predictor"), layout)
    save_agent(study, Agent(knapsack(curves_of(of), layout), np.array(0.6)))
    store = study.store(write=True)
    for one in samples:
        mask = select(Allocation(np.array(one.kept)), scores, layout)
        store.add(Sample.of(mask, "made up", one.purpose, one.ratio, 0, Measurement(one.log_ppl, one.kl, 100, 0.1)))
    store.close()
    save_report(study)
    return study


def save_agent(study, agent):
    """An agent and the nested policies that come from it."""
    agent.save(study.path("agent"), study.layout)
    chain_of(agent, study.layout).save(study.path("nested"))


def save_report(study, tau=0.9):
    """What a fit writes last."""
    heldout = {"additive": {"count": 9, "tau_mean": tau}}
    write_json(study.folder / "report.json", {"predictor": "additive", "heldout": heldout})


def fit_anew(study, tilt, most=0.6):
    """What a further fit up to a ratio does: the report goes, artefacts are replaced, a report comes.

    Odd sites lose more by a tilt.
    """
    (study.folder / "report.json").unlink()
    weights = 1 + tilt * (np.arange(len(study.layout.sites)) % 2)
    save_agent(study, Agent(np.clip(1 - np.linspace(0, 1, 101)[:, None] * weights, 0, 1), np.array(most)))
    save_report(study, 0.5)


@contextlib.contextmanager
def process(study, *options):
    """A server process; yields it and its port."""
    command = [sys.executable, "-W", "error", "-m", "ppf", "serve", str(study), "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        try:
            line = started.stdout.readline()
            assert line.startswith("serving http://127.0.0.1:"), started.stderr.read()
            yield started, int(line.rsplit(":", 1)[1])
        finally:
            if started.poll() is None:
                started.kill()


@contextlib.contextmanager
def running(study, **options):
    """A server in this process; yields its port and what serves the model, or None."""
    config = ServeConfig(str(study), port=0, **options)
    decider = Decider(study)
    mark = decider.mark
    with listen(config) as listener:
        port = listener.getsockname()[1]
        served = None if config.no_model else open_served(config, decider)
        server = server_of(Service(decider, served, config.decides_nested, mark), access_of(config, port))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        try:
            yield port, served
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def asking(port, paths, connections=4):
    """Clients that ask without a pause; yields what came back that was not 200, and what was answered."""
    failed, answered, stop = [], [], threading.Event()

    def ask(number):
        count = 0
        while not stop.is_set():
            count += 1
            try:
                status, _, body = request(port, "GET", paths[(number + count) % len(paths)])
            except OSError as error:
                failed.append(error)
                continue
            answered.append(strict(body))
            if status != 200:
                failed.append(body)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    try:
        yield failed, answered
    finally:
        stop.set()
        for thread in threads:
            thread.join()
