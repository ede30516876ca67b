"""Do pruned models of every family load and score in lm-evaluation-harness, and does training bring them nearer to the dense one?

Random models, the tiny ones of the tests: scores mean nothing, but each is compared with one counted by hand. Needs the extras
test, eval and recover.

python benchmarks/family_tasks.py
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import tiny_models as tiny
from ppf.llm.architectures import FAMILIES, layout_of_model
from ppf.llm.export import export
from ppf.llm.load import load_model, quiet_transformers
from ppf.llm.perplexity import measure, reference_of
from ppf.llm.recover import Training, recover
from ppf.llm.surgery import cut
from ppf.llm.zeroshot import task_manager, zeroshot
from record import write

ITEMS, LENGTH = 32, 12
HOW = Training(rank=8, lr=1e-2, steps=60, sequences=8, at_once=8, dtype=torch.float32, seed=0)
TASK = """task: last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{' ' + word}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


def models() -> dict[str, str]:
    """For each family the first of the tests' models."""
    kinds = {name: str(config().model_type) for name, config in tiny.TINY.items()}
    found = {family: next((name for name, kind in kinds.items() if kind == family), None) for family in FAMILIES}
    if absent := [family for family, name in found.items() if name is None]:
        raise SystemExit(f"tests/tiny_models.py must have a model of every family; it has none of {', '.join(absent)}; add one")
    return {family: str(name) for family, name in found.items()}


def write_task(folder: Path) -> np.ndarray:
    """A task of random words: which word comes last? The same as tokens, Int[ITEMS, LENGTH]."""
    blocks = tiny.blocks(ITEMS, LENGTH, seed=7)
    items = [{"context": " ".join(f"w{token}" for token in row[:-1]), "word": f"w{row[-1]}"} for row in blocks]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)) + "\n")
    (folder / "last_word.yaml").write_text(TASK.format(file=folder / "items.jsonl"))
    return blocks


def by_hand(model: PreTrainedModel, blocks: np.ndarray) -> dict[str, float]:
    """Log-perplexity of the last words, nats, and how often they are the likeliest."""
    scores = tiny.logits(model, blocks)[:, -2].log_softmax(-1)
    last = torch.from_numpy(blocks[:, -1])
    return {"log_ppl": -scores.gather(1, last[:, None]).mean().item(), "acc": (scores.argmax(-1) == last).float().mean().item()}


def scored(folders: dict[str, Path], task: Path, blocks: np.ndarray) -> dict[str, Any]:
    """What the harness says of each folder, and how far that is off the count by hand.

    The tokenizer is given: for some families transformers puts another than the tests' in the place of what lies in the folder.
    """
    names = ["last_word"]
    manager, found = task_manager(names, str(task)), {}
    for kind, folder in folders.items():
        model = load_model(str(folder)).model
        answers = zeroshot(model, tiny.tokenizer(), names, manager, None, ITEMS)["last_word"]
        log_ppl, acc, own = float(np.log(answers["perplexity"][0])), answers["acc"][0], by_hand(model, blocks)
        found[kind] = {"log_ppl": log_ppl, "acc": acc, "off": max(abs(log_ppl - own["log_ppl"]), abs(acc - own["acc"]))}
    return found


def trained(dense: PreTrainedModel, pruned: PreTrainedModel, out: Path) -> dict[str, float]:
    """KL from the dense model on text that is not trained on, nats/token: before, after, and of the exported folder."""
    heldout, text = tiny.blocks(32, LENGTH, seed=8), tiny.blocks(64, LENGTH, seed=9)
    reference = reference_of(dense, heldout)
    after = recover(copy.deepcopy(pruned), layout_of_model(pruned), text, dense, HOW, lambda note: None)
    export(after, tiny.tokenizer(), {}, out)
    kinds = {"before": pruned, "after": after, "reloaded": load_model(str(out)).model}
    return {name: float(measure(model, heldout, reference)[1].mean()) for name, model in kinds.items()}


def row_of(family: str, name: str, work: Path) -> dict[str, Any]:
    """One family."""
    task = work / "task"
    task.mkdir()
    blocks, dense = write_task(task), tiny.model(name)
    layout = layout_of_model(dense)
    pruned = cut(dense, layout, tiny.MASKS["uniform"](layout))
    folders = {"dense": tiny.save(work / "dense", name), "pruned": work / "pruned"}
    export(pruned, tiny.tokenizer(), {}, folders["pruned"])
    score = scored(folders, task, blocks)
    return {"family": family, "model": name, "lm_eval": score, "recover": trained(dense, pruned, work / "trained")}


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(1)
    quiet_transformers()
    rows = []
    for family, name in models().items():
        with tempfile.TemporaryDirectory() as work:
            rows.append(row_of(family, name, Path(work)))
        score, gain = rows[-1]["lm_eval"], rows[-1]["recover"]
        shown = [f"{kind} {one['log_ppl']:.4f} (off {one['off']:.1e})" for kind, one in score.items()]
        print(f"{family:<12} lm-eval {', '.join(shown)}; KL {gain['before']:.4f} -> {gain['after']:.4f}", flush=True)
    sizes = {"items": ITEMS, "steps": HOW.steps, "rank": HOW.rank, "tokens": HOW.steps * HOW.sequences * LENGTH}
    write("family_tasks", HOW.seed, {"rows": rows, **sizes})


if __name__ == "__main__":
    main()
