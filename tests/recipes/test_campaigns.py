"""Long campaigns: kills of a fit wherever it is, two runs of one seed, and thousands of measurements in one process."""

import os
import random
import resource
import shutil
import signal
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

import ppf
import tiny_models
from builders import random_mask
from fit_runs import again
from ppf.errors import PPFError
from ppf.llm.architectures import layout_of_model
from ppf.llm.engines.bench import InProcessEngine
from ppf.llm.text import Text
from ppf.samples import SampleStore
from ppf.study import StudyFolder

pytestmark = pytest.mark.slow
LEARNT = ("predictor", "agent", "nested", "importance", "text")


def fit(folder, text):
    return again(folder, text)


def killed(work, seconds):
    """Does work in a child that is killed after some time; whether it was in time to be killed."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            return False
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def figures(folder):
    """What a store holds but for the seconds, which no two runs share."""
    study = StudyFolder(folder)
    with closing(SampleStore(folder / "samples.sqlite", study.context)) as store:
        return {one.digest: replace(one, seconds=0.0) for one in store.all()}


def learnt(folder):
    return {name: (folder / f"{name}.safetensors").read_bytes() for name in LEARNT}


def test_thirty_kills_anywhere_change_no_figure_and_no_artefact(fitted, place, tmp_path):
    study, rng, kills, start = tmp_path / "s", random.Random(0), 0, time.perf_counter()
    fit(tmp_path / "whole", place / "text.txt")
    length = time.perf_counter() - start
    while kills < 30:
        hit = killed(lambda: fit(study, place / "text.txt"), rng.uniform(0, length))
        kills += hit
        if not hit:
            shutil.rmtree(study)
    fit(study, place / "text.txt")
    assert figures(study) == figures(fitted.folder) == figures(tmp_path / "whole") and learnt(study) == learnt(fitted.folder)


def test_fifty_kills_while_it_learns_lead_to_the_same_artefacts_bit_for_bit(fitted, tmp_path):
    """What is learnt is not saved on the way: it is learnt again from the samples, which takes seconds and gives the same."""
    whole, rng, kills = learnt(fitted.folder), random.Random(1), 0
    folder, start = Path(shutil.copytree(fitted.folder, tmp_path / "s")), time.perf_counter()
    (folder / "report.json").unlink()
    again(folder)
    length = time.perf_counter() - start
    while kills < 50:
        (folder / "report.json").unlink(missing_ok=True)
        for name in rng.sample(("predictor", "agent", "nested"), rng.randrange(4)):
            (folder / f"{name}.safetensors").unlink(missing_ok=True)
        kills += killed(lambda: again(folder), rng.uniform(0, 1.1 * length))
        try:
            ppf.Study(folder).policy(ratio=0.3)
        except PPFError as error:
            assert error.exit_code == 2, error
        found = {name: path.read_bytes() for name in LEARNT if (path := folder / f"{name}.safetensors").exists()}
        assert all(whole[name] == content for name, content in found.items())
    again(folder)
    assert learnt(folder) == whole and figures(folder) == figures(fitted.folder)


def test_two_runs_of_a_seed_give_the_same_bytes(fitted, place, tmp_path):
    fit(tmp_path / "again", place / "text.txt")
    assert figures(tmp_path / "again") == figures(fitted.folder) and learnt(tmp_path / "again") == learnt(fitted.folder)
    outs = []
    for number, folder in enumerate((fitted.folder, tmp_path / "again")):
        study = ppf.Study(folder, tiny_models.model("llama-mha"), tiny_models.tokenizer())
        assert study.policy(ratio=0.3).mask.digest == fitted.policy(ratio=0.3).mask.digest
        study.prune(ratio=0.3).save_pretrained(tmp_path / f"out{number}")
        outs.append({path.name: path.read_bytes() for path in (tmp_path / f"out{number}").iterdir() if path.name != "ppf.json"})
    assert outs[0] == outs[1] and "model.safetensors" in outs[0]


def test_two_thousand_measurements_leak_neither_memory_nor_files():
    model = tiny_models.model("llama-mha")
    layout, ids = layout_of_model(model), tiny_models.blocks(8, 16)
    engine = InProcessEngine(model, layout, Text("t", ids, ids, ids[:0], ids), 4096)

    def held():
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * resource.getpagesize(), len(list(Path("/proc/self/fd").iterdir()))

    masks = [random_mask(layout, seed) for seed in range(100)]
    list(engine.measure(masks))
    before = held()
    for _ in range(20):
        assert all(not result.reason for _, result in engine.measure(masks))
    after = held()
    assert after[0] - before[0] <= 20 * 2**20 and after[1] == before[1]
