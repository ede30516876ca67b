"""The changes that CONTRIBUTING.md shows are applied to a copy of the source, which is then used."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ppf

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CHANGES = dict(re.findall(r"### ([\w ]+)\n.*?```diff\n(.*?)```", GUIDE, re.DOTALL))

USE = """
import sys
from pathlib import Path

import numpy as np
from transformers import ArceeConfig, ArceeForCausalLM, AutoModelForCausalLM

import ppf
import tiny_models
from ppf.learn.baselines import HEURISTICS
from ppf.llm.families import supported
from ppf.space.allocation import allocate
from ppf.space.budget import Budget

place = Path(sys.argv[1])
assert place in Path(ppf.__file__).parents, ppf.__file__
words = np.random.default_rng(0).integers(3, tiny_models.VOCAB, 4000)
(place / "text.txt").write_text(" ".join(f"w{index}" for index in words))
model = ArceeForCausalLM(ArceeConfig(**tiny_models.SIZES | {"num_hidden_layers": 2}, num_key_value_heads=4)).eval()
sizes = {"calibration_tokens": 64, "search_tokens": 128, "validation_tokens": 0, "test_tokens": 256, "seq_len": 16}
study = ppf.fit(
    model, tokenizer=tiny_models.tokenizer(), study=place / "study", text=place / "text.txt", score="largest", samples=24, rounds=0,
    quiet=True, device="cpu", **sizes,
)
assert study.report["importance"]["method"] == "largest"
pruned = study.prune(0.3)
pruned.save_pretrained(place / "smaller")
assert type(AutoModelForCausalLM.from_pretrained(place / "smaller")).__name__ == "PPFArceeForCausalLM"
assert "arcee" in [one.family for one in supported()]
assert "Arcee" in (place / "smaller" / "modeling_ppf.py").read_text()
decider = ppf.Decider(place / "study")
layout = decider.layout
kept = allocate(HEURISTICS["pyramid"](None, None, layout, 0.3), Budget.from_ratio(0.3, layout), layout).kept / layout.units
assert kept[1] > kept[3]
rows = decider.agent.keep[decider.agent.rows(np.linspace(0.03, 0.6, 500))]
assert 10 < len(np.unique(rows, axis=0)) <= 20
print("used")
"""


def apply(diff, root):
    """Applies a diff without line numbers: what a hunk takes away or leaves must be in the file once."""
    for part in re.split(r"^--- ", diff, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        for hunk in re.split(r"^@@.*\n", body, flags=re.MULTILINE):
            lines = hunk.splitlines()
            old, new = ("\n".join(line[1:] for line in lines if line[0] in signs) for signs in ("- ", "+ "))
            path = root / name.strip()
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            assert text.count(old) == 1 or not (text or old), f"{name}: {old!r} is there {text.count(old)} times"
            path.write_text(text.replace(old, new, 1) if old else new + "\n", encoding="utf-8")


def added(diff):
    return [line for line in diff.splitlines() if line.startswith("+") and line.strip("+ ")]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The source with every change."""
    root = tmp_path_factory.mktemp("copy")
    shutil.copytree(Path(ppf.__file__).parent, root / "src" / "ppf", ignore=shutil.ignore_patterns("models", "__pycache__"))
    for diff in CHANGES.values():
        apply(diff, root)
    return root


def test_each_kind_of_change_is_shown():
    assert set(CHANGES) == {"A model family", "A score", "A baseline", "An agent"}


@pytest.mark.parametrize("kind", ["A model family", "A score", "A baseline"])
def test_a_change_takes_fewer_than_twenty_lines(kind):
    assert len(added(CHANGES[kind])) < 20


def test_the_changed_copy_works(copy):
    command = [sys.executable, "-c", USE, str(copy)]
    surroundings = {"PYTHONPATH": f"{copy / 'src'}:{Path(__file__).parent}", "OMP_NUM_THREADS": "1", "HOME": str(copy)}
    result = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    assert result.stdout == "used\n", result.stderr
