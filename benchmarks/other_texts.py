"""Do policies hold on text that they were not chosen on? The cells of `ppf bench`, measured again on other texts.

python benchmarks/other_texts.py --name ref-a --studies runs/a0 runs/a1 --texts pydocs book.txt
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
from typing import Any

import numpy as np
import torch

from page import label
from ppf.decide import Decider
from ppf.llm.engines.bench import InProcessEngine
from ppf.llm.load import LoadedModel, load_model
from ppf.llm.text import Text, take_blocks, whole_text
from ppf.recipes.cells import current_cells
from ppf.recipes.choices import choose_placement
from ppf.recipes.summary import summarise
from ppf.space.allocation import Allocation
from ppf.space.mask import Mask, select
from record import write

METHODS = ("uniform", "owl", "alpha_pruning", "additive", "nested", "dynamic", "static")
"""All with the importance of the study."""
TOKENS_PER_BATCH = 1024


def cells_on(decider: Decider, loaded: LoadedModel, cells: list[dict[str, Any]], blocks: np.ndarray) -> list[dict[str, Any]]:
    """The cells with what their masks do on other blocks."""
    layout, none = decider.layout, blocks[:0]
    model = loaded.on(choose_placement("cpu"), torch.float32)
    engine = InProcessEngine(model, layout, Text("", none, blocks, none, none), TOKENS_PER_BATCH)
    masks = [select(Allocation(np.array(cell["kept"])), decider.importance, layout) for cell in cells]
    everything = Mask(tuple(np.ones(units, dtype=bool) for units in layout.units))
    dense, *found = [answer for _, answer in engine.measure([everything, *masks])]
    above = [np.subtract(answer.losses, dense.losses).tolist() for answer in found]
    return [{**cell, "above": above[i], "kl": list(found[i].divergences)} for i, cell in enumerate(cells)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--studies", nargs="+", required=True)
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--ratios", nargs="+", type=float, default=[0.2, 0.3, 0.4, 0.5])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    deciders = [Decider(folder) for folder in arguments.studies]
    settings = [decider.study.record["settings"] for decider in deciders]
    if len({decider.study.record["model"]["digest"] for decider in deciders}) > 1:
        parser.error("--studies must be of one model; some are not")
    if searched := {label(one["text"]) for one in settings} & {label(text) for text in arguments.texts}:
        parser.error(f"--texts must be others than what was searched on; {min(searched)} came")
    loaded = load_model(deciders[0].study.record["model"]["name"])
    length, rows = deciders[0].study.record["seq_len"], {}
    for text in arguments.texts:
        blocks = take_blocks(whole_text(text, loaded.tokenizer), length, arguments.tokens, 0, text)
        cells = []
        for decider in deciders:
            known = current_cells(decider.study)
            wanted = [cell for cell in known if cell["method"] in METHODS and cell["ratio"] in arguments.ratios]
            cells += cells_on(decider, loaded, wanted, blocks)
        rows[label(text)] = summarise(cells, "static")
    seeds = [one["seed"] for one in settings]
    chosen_on = label(settings[0]["text"])
    write(f"texts-{arguments.name}", seeds[0], {"seeds": seeds, "searched": chosen_on, "tokens": blocks.size, "texts": rows})


if __name__ == "__main__":
    main()
