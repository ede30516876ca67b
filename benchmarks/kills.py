"""What does a kill cost? A fit killed at random moments, and two writers of one store killed together: what was lost.

The fit is of a model of random weights, as small as a fit can be, in a child of this process, so that it starts in no time.
Whenever one ends in spite of all, its store is compared with that of a fit that nobody killed, and the next begins.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ppf.config import FitConfig
from ppf.llm.load import LoadedModel, adopt_model, load_model
from ppf.progress import Progress
from ppf.recipes.fit import fit
from ppf.samples import Sample, SampleStore
from ppf.study import StudyFolder
from record import HERE, write

WORDS = "def add(first, second):\n    return first + second  # of two numbers, the sum\n"


def tiny_model(seed: int) -> LoadedModel:
    """A Llama of two layers with the tokenizer of ref-a."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = load_model("ref-a").tokenizer
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, **shape)
    return adopt_model(LlamaForCausalLM(config).eval(), tokenizer)


def config_of(study: Path, text: Path, seed: int) -> FitConfig:
    """As cheap a fit as there can be."""
    return FitConfig(
        "", str(study), text=str(text), samples=120, rounds=1, score="magnitude", predictor="additive", seq_len=32, device="cpu",
        calibration_tokens=64, search_tokens=512, validation_tokens=0, test_tokens=64, seed=seed,
    )  # fmt: skip


def start(work: Callable[[], object], told: int) -> int:
    """Work in a child, which tells of each sample when it is committed."""
    pid = os.fork()
    if pid:
        return pid
    add = SampleStore.add

    def add_and_tell(store: SampleStore, sample: Sample) -> None:
        add(store, sample)
        os.write(told, f"{sample.digest}\n".encode())

    try:
        with patch.object(SampleStore, "add", add_and_tell):
            work()
        os._exit(0)
    finally:
        os._exit(1)


def figures(study: Path) -> dict[str, tuple[float, float]]:
    """What the store holds, by mask."""
    if not (study / "samples.sqlite").exists():
        return {}
    with closing(StudyFolder(study).store(write=True)) as store:
        return {sample.digest: (sample.log_ppl, sample.kl) for sample in store.all()}


def killed_fits(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts of the campaign."""
    loaded, rng, text = tiny_model(seed), random.Random(seed), folder / "text.txt"
    text.write_text(WORDS * 2000)
    begin = time.perf_counter()
    fit(config_of(folder / "whole", text, seed), Progress(quiet=True), loaded)
    length, whole = time.perf_counter() - begin, figures(folder / "whole")
    count: dict[str, Any] = dict.fromkeys(("kills", "acknowledged", "lost", "altered", "measured_twice", "finished", "unlike"), 0)
    study, acknowledged, reach = folder / "study 0", set[str](), length / 4
    while count["kills"] < kills:
        heard, told = os.pipe()
        pid = start(partial(fit, config_of(study, text, seed), Progress(quiet=True), loaded), told)
        os.close(told)
        time.sleep(rng.uniform(0, reach))
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        with os.fdopen(heard) as file:
            lines = [line.strip() for line in file if line.endswith("\n")]
        reach = length / 4 if lines else min(2 * reach, 2 * length)  # until it gets beyond where it was killed
        count["measured_twice"] += len(acknowledged & set(lines))
        acknowledged |= set(lines)
        found = figures(study)
        count["kills"] += os.WIFSIGNALED(status)
        count["acknowledged"] += len(lines)
        count["lost"] += len(acknowledged - set(found))
        count["altered"] += sum(whole.get(digest) != values for digest, values in found.items())
        if not os.WIFSIGNALED(status):
            if status:
                raise SystemExit("a fit that went on after a kill failed")
            count["finished"] += 1
            count["unlike"] += found != whole
            study, acknowledged = folder / f"study {count['finished']}", set()
    return {"samples_of_a_fit": len(whole), "seconds_of_a_fit": round(length, 2), **count}


def killed_writers(kills: int, seed: int, folder: Path) -> dict[str, Any]:
    """Counts of the store alone."""
    command = [sys.executable, str(HERE.parent / "tests" / "killing.py"), str(folder / "store"), str(kills), str(seed)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fits", type=int, default=100)
    parser.add_argument("--writers", type=int, default=300)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = {
            "fits": killed_fits(arguments.fits, arguments.seed, Path(temporary)),
            "writers": killed_writers(arguments.writers, arguments.seed, Path(temporary)),
        }
    write("kills", arguments.seed, result)
