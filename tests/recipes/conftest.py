import shutil
from pathlib import Path

import numpy as np
import pytest

import ppf
import tiny_models
from fit_runs import SETTINGS


def words(count, seed):
    """Random words of the tiny tokenizer."""
    return " ".join(f"w{index}" for index in np.random.default_rng(seed).integers(3, tiny_models.VOCAB, count))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a tiny model and a text."""
    folder = tmp_path_factory.mktemp("place")
    tiny_models.save(folder / "model", "llama-mha")
    (folder / "text.txt").write_text(words(4000, 0))
    (folder / "long.txt").write_text(words(40_000, 1))
    return folder


@pytest.fixture(scope="session")
def fitted(place):
    """A fitted study of that model, given as an object, so that measuring happens in this process."""
    return ppf.fit(
        tiny_models.model("llama-mha"), tokenizer=tiny_models.tokenizer(), study=place / "study", text=str(place / "text.txt"),
        quiet=True, **SETTINGS,
    )  # fmt: skip


@pytest.fixture
def copy(fitted, tmp_path):
    """A copy of a fitted study, to damage."""
    return Path(shutil.copytree(fitted.folder, tmp_path / "study"))
