"""Does a pruned model of every family work everywhere? Each cell is a measured difference, on small random models.

python benchmarks/families.py
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ppf.errors import UnsupportedError
from ppf.llm.architectures import layout_of_model
from ppf.llm.export import export
from ppf.llm.gguf import write_gguf
from ppf.llm.load import quiet_transformers
from ppf.llm.masking import masked
from ppf.llm.surgery import cut
from ppf.space.allocation import Allocation
from ppf.space.mask import select
from record import write

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import tiny_models
from builders import importance, random_mask

LENGTH = 24
TOKENS = 16
STRANGER = """
import json, sys, torch
sys.modules["ppf"] = None
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

logging.set_verbosity_error()
ids = torch.tensor(json.loads(sys.argv[2]))
answers = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    answers[folder.name] = model(input_ids=ids, use_cache=False).logits.detach().contiguous()
save_file(answers, sys.argv[3])
"""


def row_of(name: str, ids: torch.Tensor, seed: int, folder: Path) -> dict[str, Any]:
    """One model, cut by a random mask and exported: all that this process can measure.

    Returns:
        Largest differences of logits, tokens that a cache changes, parameters beyond what the layout says; None for a GGUF
        file that cannot be written or checked, with the reason in ``no_gguf``. ``gguf_alike`` is for half of every layer.
    """
    model = tiny_models.model(name, seed)
    layout = layout_of_model(model)
    mask = random_mask(layout, seed)
    smaller = cut(model, layout, mask)
    with masked(model, layout, mask):
        expected = logits(model, ids)
    export(smaller, tiny_models.tokenizer(), {}, folder)
    again = AutoModelForCausalLM.from_pretrained(folder).eval()
    params = sum(parameter.numel() for parameter in smaller.parameters())
    gguf, reason = in_llama_cpp(smaller, folder.parent.parent / "file.gguf")
    halves = select(Allocation(np.maximum(layout.units // 2, layout.floors)), importance(layout, seed), layout)
    alike, reason_alike = in_llama_cpp(cut(model, layout, halves), folder.parent.parent / "file.gguf")
    return {
        "model": name,
        "family": layout.model_type,
        "scale": float(expected.std()),
        "masked": difference(logits(smaller, ids), expected),
        "reload": difference(logits(again, ids), logits(smaller, ids)),
        "cache": int((generated(again, ids, True) != generated(again, ids, False)).sum()),
        "gguf": gguf,
        "no_gguf": reason,
        "gguf_alike": alike,
        "no_gguf_alike": reason_alike,
        "params": params - int(layout.kept_params(mask.allocation.kept)),
    }


@torch.inference_mode()
def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())


def generated(model: PreTrainedModel, ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
    """Int[B, T]: greedy tokens behind prompts."""
    settings = GenerationConfig(max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False, pad_token_id=2, eos_token_id=2)
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, use_cache=use_cache)


def in_llama_cpp(model: PreTrainedModel, file: Path) -> tuple[float | None, str | None]:
    """The relative difference of logits in llama.cpp, or why there is none."""
    if importlib.util.find_spec("llama_cpp") is None:
        return None, "llama-cpp-python is not installed"
    try:
        return write_gguf(model, tiny_models.tokenizer(), file, "f32", "tiny", force=True).check.difference, None
    except UnsupportedError as error:
        return None, str(error)


def without_ppf(rows: list[dict[str, Any]], ids: torch.Tensor, folders: Path, answers: Path) -> None:
    """Adds what a process that cannot import ppf makes of the folders, with remote code."""
    command = [sys.executable, "-c", STRANGER, str(folders), json.dumps(ids.tolist()), str(answers)]
    environment = {**os.environ, "HF_HOME": str(answers.parent), "HF_HUB_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, stdin=subprocess.DEVNULL)
    theirs = load_file(answers)
    for row in rows:
        ours = AutoModelForCausalLM.from_pretrained(folders / row["model"]).eval()
        row["without_ppf"] = difference(theirs[row["model"]], logits(ours, ids))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args().seed
    quiet_transformers()
    ids = torch.from_numpy(tiny_models.blocks(2, LENGTH, seed))
    with tempfile.TemporaryDirectory() as place:
        folders = Path(place) / "folders"
        folders.mkdir()
        rows = [row_of(name, ids, seed, folders / name) for name in tiny_models.TINY]
        without_ppf(rows, ids, folders, Path(place) / "answers.safetensors")
    for row in rows:
        print({key: value for key, value in row.items() if not key.startswith("no_gguf")}, flush=True)
    write("families", seed, {"protocol": {"batch": len(ids), "length": LENGTH, "new_tokens": TOKENS}, "rows": rows})


if __name__ == "__main__":
    main()
