"""How long after a move of the page's slider is everything redrawn? In Chromium, for a study and at the layout of a large model.

known    places of the slider, which the page has asked for in advance
asked    ratios in between, for which it must ask the server first

Needs `pip install -e ".[browser]"` and Chromium.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))

import numpy as np
from playwright.sync_api import Page, sync_playwright

from decision_speed import MODELS, synthetic_study
from ppf.llm.architectures import layout_of
from record import write
from slider_moves import move

MOVES = 120
LARGE = "Llama-3-70B"


@contextmanager
def served(study: Path) -> Iterator[str]:
    """The address of a server of a study's decisions."""
    command = [sys.executable, "-m", "ppf", "serve", str(study), "--no-model", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def times(page: Page, ratios: np.ndarray) -> dict[str, float]:
    """Milliseconds from the event to the frame after everything changed."""
    found = [move(page, ratio) for ratio in ratios]
    return {"median": round(float(np.median(found)), 1), "p99": round(float(np.quantile(found, 0.99)), 1)}


def measure(page: Page, study: Path, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    with served(study) as address:
        page.goto(address)
        page.wait_for_selector("body[data-ready=all]")
        places = rng.permutation(np.arange(4, 120))[:MOVES] * 0.005
        known = times(page, places)
        page.evaluate("document.getElementById('ratio').step = '0.0001'")
        asked = times(page, rng.permutation(places) + 0.0021)
        return {"bars": page.locator(".fill").count(), "moves": len(places), "known_ms": known, "asked_ms": asked}


def picture(page: Page, study: Path, path: Path) -> None:
    """The upper part of the page, at half of the model."""
    with served(study) as address:
        page.set_viewport_size({"width": 1000, "height": 900})
        page.goto(address)
        page.wait_for_selector("body[data-ready=all]")
        move(page, 0.5)
        box = page.locator("#chart").bounding_box()
        page.screenshot(path=path, full_page=True, clip={"x": 0, "y": 0, "width": 1000, "height": box["y"] + box["height"] + 48})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("study", help="a fitted one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="also take a picture of the page")
    arguments = parser.parse_args()
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        decider, _ = synthetic_study(Path(folder), layout_of(MODELS[LARGE]), 300, arguments.seed)
        decider.study.store(write=True).close()
        if arguments.picture:
            picture(page, Path(arguments.study), arguments.picture)
        studies = {Path(arguments.study).name: Path(arguments.study), LARGE: Path(folder)}
        result = {name: measure(page, study, arguments.seed) for name, study in studies.items()}
        write("slider", arguments.seed, {"browser": f"Chromium {browser.version}", **result})
        browser.close()
