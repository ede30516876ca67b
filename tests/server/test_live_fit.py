"""Those who read a study while a fit of it runs in another process: for its policies, for a report, and to serve it."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

import ppf
import tiny_models
from fit_runs import SETTINGS
from ppf.config import ReportConfig
from ppf.decide import Decider
from ppf.errors import InputError
from ppf.report import write_report
from server_runs import asking, running

pytestmark = pytest.mark.slow


@pytest.fixture
def fit(tmp_path):
    """The command of a fit into ``study``."""
    text, model = tmp_path / "text.txt", tiny_models.save(tmp_path / "model", "llama-mha")
    text.write_text(" ".join(f"w{index}" for index in np.random.default_rng(0).integers(3, tiny_models.VOCAB, 4000)))
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    files = ["--study", str(tmp_path / "study"), "--text", str(text), "--workers", "1"]
    return [sys.executable, "-m", "ppf", "fit", str(model), *files, *flags]


def read_by_all(study, out):
    """How often each who reads was answered, or told in one line to wait."""
    found = Counter()
    readers = {
        "policy": lambda: ppf.Study(study).policy(ratio=0.3).allocation,
        "report": lambda: write_report(ReportConfig(str(study), out=str(out))),
        "serve": lambda: Decider(study).mark,
    }
    for name, read in readers.items():
        try:
            read()
        except InputError as error:
            assert str(error).count("; ") == 2 and ("has not ended" in str(error) or "no study.json" in str(error))
            found[name, "told to wait"] += 1
        else:
            found[name, "answered"] += 1
    return found


def while_it_runs(command, study, out):
    found = Counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            found += read_by_all(study, out)
        assert process.returncode == 0, process.stderr.read()
    return found


def test_readers_are_told_to_wait_for_the_first_fit_and_answered_during_the_next(fit, tmp_path):
    study, out = tmp_path / "study", tmp_path / "report.html"
    first = while_it_runs(fit, study, out)
    assert all(first[name, "told to wait"] > 10 for name in ("policy", "report", "serve"))
    assert set(read_by_all(study, out)) == {(name, "answered") for name in ("policy", "report", "serve")}
    paths = ["/api/policy?ratio=0.4", "/api/policy?ratio=0.2&nested=true", "/api/study"]
    with running(study, no_model=True) as (port, _), asking(port, paths, connections=1) as (failed, answered):
        second = while_it_runs([*fit, "--predictor", "additive"], study, out)
    assert not failed and len(answered) > 20
    for name in ("policy", "report", "serve"):  # while files are replaced, for milliseconds, nobody is answered
        assert second[name, "answered"] > 10 * second[name, "told to wait"] and second[name, "answered"] > 10
