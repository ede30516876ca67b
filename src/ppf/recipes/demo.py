"""demo: the main job on the embedded model and text, and one table of what came out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppf.config import DemoConfig, FitConfig, Target
from ppf.decide import Decider
from ppf.llm.load import LoadedModel, load_model
from ppf.llm.perplexity import evaluate
from ppf.llm.placement import convert
from ppf.llm.surgery import cut
from ppf.llm.text import Text
from ppf.progress import Progress
from ppf.recipes.choices import tokens_per_batch
from ppf.recipes.fit import fit
from ppf.recipes.prune import prune
from ppf.space.policy import Policy

RATIOS = (0.2, 0.3, 0.5)


def demo(config: DemoConfig, progress: Progress) -> list[dict[str, Any]]:
    """Fits ``ref-a`` on ``pydocs`` and exports three checkpoints.

    Args:
        config: Where to, how many samples, which seed.
        progress: Shows what happens.

    Returns:
        One record a ratio, for the table.

    Raises:
        InputError: The folder holds something else, or a study of other settings.
    """
    with progress.stage("loading"):
        loaded = load_model("ref-a")
    fit(FitConfig("ref-a", config.out, samples=config.samples, seed=config.seed, device="cpu"), progress, loaded)
    rows = []
    for ratio in RATIOS:
        pruned = prune(config.out, loaded, Target(ratio=ratio), "cpu", 0, progress)
        out = Path(config.out) / f"pruned-{round(100 * ratio)}"
        with progress.stage("writing"):
            size = pruned.save_pretrained(out, force=True)
        plan = pruned.plan
        rows.append(
            {
                "ratio": plan["ratio"]["met"],
                "predicted": plan["predicted"]["ppl"],
                "measured": plan["measured"]["ppl"],
                "uniform": _uniform(config.out, loaded, ratio),
                "dense": plan["dense"]["ppl"],
                "params": plan["params"]["after"],
                "bytes": size,
                "tokens_per_second": plan["tokens_per_second"],
                "folder": str(out),
            }
        )
    return rows


def _uniform(folder: str, loaded: LoadedModel, ratio: float) -> float:
    """Measured perplexity of the uniform policy at the same budget, on the same text."""
    decider = Decider(folder)
    decision = decider.decide(Target(ratio=ratio), Policy.uniform(decider.layout))
    smaller = convert(cut(loaded.model, loaded.layout, decision.mask), torch.device("cpu"), torch.float32)
    text = Text.load(decider.study.path("text"), decider.layout.fingerprint)
    return float(np.exp(evaluate(smaller, text.test, tokens_per_batch(torch.device("cpu"))).log_ppl))
