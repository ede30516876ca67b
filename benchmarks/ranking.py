"""Who says best which of two masks of one size does less damage: the predictor, addition, or a short true measurement?

The held-out masks of a study lie around good policies and no predictor was fitted to them. Each judge ranks those of one
ratio. Truth is their damage on other blocks of the study's text, on other texts, and, as the last column, on the very blocks
that the predictors were fitted on.

    python benchmarks/ranking.py --study runs/a0 --name ref-a --texts book.txt other.txt
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from page import label
from ppf.decide import Decider
from ppf.learn.fit_predictor import FITS, fit_predictor
from ppf.learn.metrics import tau
from ppf.learn.predictor import Predictor
from ppf.llm.engines.bench import InProcessEngine
from ppf.llm.load import load_model
from ppf.llm.text import Text, take_blocks, whole_text
from ppf.recipes.choices import choose_placement
from ppf.samples import Sample, kept_matrix
from ppf.space.allocation import Allocation
from ppf.space.mask import select
from ppf.study import StudyFolder
from record import write

BLOCKS = (1, 2, 4, 8)
"""Of the validation text: what a short true measurement may read."""
TOKENS_PER_BATCH = 1024
SEARCHED = "measured on the search text"


class Truth:
    """Damages of the held-out masks, block by block; those of the validation text in an order drawn by lot.

    Args:
        decider: Of the study.
        samples: Its held-out masks.
        texts: Other text files.
        tokens: Of each text that nothing was fitted to.
    """

    def __init__(self, decider: Decider, samples: Sequence[Sample], texts: Sequence[str], tokens: int) -> None:
        loaded = load_model(decider.study.record["model"]["name"])
        model = loaded.on(choose_placement("cpu"), torch.float32)
        own = Text.load(decider.study.path("text"), decider.layout.fingerprint)
        length = own.search.shape[1]
        streams = {label(name): whole_text(name, loaded.tokenizer) for name in texts}
        drawn = np.random.default_rng(0).permutation(own.validation)[: max(BLOCKS) + tokens // length]
        test = own.test[:: max(1, own.test.size // tokens)]
        parts = {"validation": drawn, "test": test}
        parts |= {name: take_blocks(stream, length, tokens, 0, name) for name, stream in streams.items()}
        masks = [select(Allocation(np.array(sample.kept)), decider.importance, decider.layout) for sample in samples]
        self.blocks: dict[str, np.ndarray] = {}
        self.seconds: dict[str, float] = {}
        for name, blocks in parts.items():
            engine = InProcessEngine(
                model, decider.layout, Text(name, own.calibration, blocks, own.validation[:0], blocks), TOKENS_PER_BATCH
            )
            start = time.perf_counter()
            self.blocks[name] = np.array([answer.divergences for _, answer in engine.measure(masks)])
            self.seconds[name] = (time.perf_counter() - start) / len(masks) / blocks.size


def within(judged: np.ndarray, truth: np.ndarray, ratios: np.ndarray) -> dict[str, float]:
    """Kendall's tau among the masks of each ratio."""
    return {f"{ratio:g}": round(tau(judged[ratios == ratio], truth[ratios == ratio]), 3) for ratio in np.unique(ratios)}


def judges_of(
    study: StudyFolder, heldout: list[Sample], fitted: list[Sample], validation: np.ndarray
) -> dict[str, tuple[np.ndarray, int]]:
    """By name: what each expects of the held-out masks, and the tokens it ran a mask through."""
    dense, settings = study.record["dense"]["search"]["log_ppl"], study.record["settings"]
    kept, length = kept_matrix(heldout, study.layout), study.record["seq_len"]
    predictors = {kind: fit_predictor(kind, fitted, [], study.layout, dense, settings["seed"]) for kind in FITS}
    found = {kind: (predictor.predict(kept).damage, 0) for kind, predictor in predictors.items()}
    for count in BLOCKS:
        found[f"measured on {count * length} other tokens"] = validation[:, :count].mean(axis=1), count * length
    return {**found, SEARCHED: (np.array([sample.kl for sample in heldout]), heldout[0].tokens)}


def judged(
    judges: dict[str, tuple[np.ndarray, int]], truths: dict[str, np.ndarray], ratios: np.ndarray
) -> dict[str, dict[str, Any]]:
    """How well each ranks the masks of a ratio by each truth."""
    found = {}
    for judge, (expected, tokens) in judges.items():
        taus = {name: within(expected, real, ratios) for name, real in truths.items()}
        if judge != SEARCHED:  # on the very text that the predictors were fitted on
            taus["search"] = within(expected, judges[SEARCHED][0], ratios)
        found[judge] = {"tokens": tokens, "tau_within": taus}
    return found


def _seconds(predictor: Predictor, kept: np.ndarray) -> float:
    """Of a prediction of one mask, as a search asks for it."""
    start = time.perf_counter()
    for row in kept:
        predictor.predict(row[None])
    return (time.perf_counter() - start) / len(kept)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--texts", nargs="*", default=[])
    parser.add_argument("--tokens", type=int, default=8192, help="of each text that nothing was fitted to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    decider = Decider(arguments.study)
    study = decider.study
    samples, length = study.store().all(), study.record["seq_len"]
    heldout = [sample for sample in samples if sample.purpose == "heldout"]
    fitted = sorted((s for s in samples if s.purpose in ("probe", "spread", "search")), key=lambda s: (s.round, s.digest))
    kept, ratios = kept_matrix(heldout, study.layout), np.array([sample.ratio for sample in heldout])
    truth = Truth(decider, heldout, arguments.texts, arguments.tokens)
    validation = truth.blocks["validation"]
    if validation.shape[1] <= max(BLOCKS):
        parser.error(f"--study must have more than {max(BLOCKS)} validation blocks; it has {validation.shape[1]}")
    judges = judges_of(study, heldout, fitted, validation)
    # What a judge reads is no part of the truth that it is judged by.
    truths = {"validation": validation[:, max(BLOCKS) :].mean(axis=1)}
    truths |= {name: found.mean(axis=1) for name, found in truth.blocks.items() if name != "validation"}
    seconds = {"prediction": _seconds(decider.predictor, kept), "token_measured": truth.seconds["validation"]}
    write(
        f"ranking-{arguments.name}",
        study.record["settings"]["seed"],
        {
            "masks": len(heldout),
            "fitted": len(fitted),
            "truth_tokens": {n: int(b.shape[1] * length) for n, b in truth.blocks.items()}
            | {"validation": int(validation.shape[1] - max(BLOCKS)) * length},
            "judges": judged(judges, truths, ratios),
            "seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
