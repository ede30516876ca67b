"""How much memory does each stage take? A random Llama of 1.1 B parameters, one stage after another, each in a fresh process.

peak        VmHWM of the process: all that it ever held at once, pages of mapped weight files too
own         the most that was its own (RssAnon): pages of mapped files are the system's, which drops them where memory is short
together    with its children, the most that was held at once, shared pages counted once (Pss)

Weights are bfloat16, in shards of at most 500 MB. Text is 2,048 tokens a block.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from record import HERE, write

TOKENS = 2048
SHARD = "500MB"
SHAPE = {
    "vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
RATIO = 0.3
INTERVAL = 0.02


def prepare(place: Path, seed: int) -> None:
    """The model's folder, a text, and the plan of an earlier export."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ppf.llm.load import load_model

    torch.manual_seed(seed)
    config = LlamaConfig(**SHAPE)
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1.0) if "norm" in name else parameter.data.normal_(0, 0.02)
    model.save_pretrained(place / "model", max_shard_size=SHARD)
    load_model("ref-a").tokenizer.save_pretrained(place / "model")
    words = np.random.default_rng(seed).integers(0, 2000, 120_000)
    (place / "text.txt").write_text(" ".join(f"word{word}" for word in words))


def plan(place: Path, seed: int) -> None:
    """The plan: 30 % of every site, at random."""
    from ppf.llm.architectures import layout_of
    from ppf.llm.load import read_config
    from ppf.space.allocation import allocate
    from ppf.space.budget import Budget
    from ppf.space.mask import Mask
    from ppf.space.policy import Policy

    layout = layout_of(read_config(place / "model"))
    kept = allocate(Policy.uniform(layout), Budget.from_ratio(RATIO, layout), layout).kept
    rng = np.random.default_rng(seed)
    mask = Mask(tuple(rng.permutation(units) < count for units, count in zip(layout.units, kept, strict=True)))
    record = {
        "format": 1,
        "model": {"name": "model", "digest": "", "type": layout.model_type},
        "layout": layout.fingerprint,
        "kept": [{"kept": int(count)} for count in kept],
        "compensation": {"method": "none"},
        "mask": [np.packbits(bits).tobytes().hex() for bits in mask.bits],
    }
    (place / "plan.json").write_text(json.dumps(record))


def imports(place: Path) -> None:
    """What a process has before it does anything."""
    import ppf.recipes.apply_plan  # noqa: F401


def score(place: Path) -> None:
    """The scores that need gradients, one block."""
    from ppf.llm.load import load_model
    from ppf.llm.scores import score_units

    loaded = load_model(str(place / "model"))
    score_units(loaded.model, loaded.layout, blocks(place), "taylor", "", 0)


def evaluation(place: Path) -> None:
    """Log-perplexity and KL of the dense model, one block."""
    from ppf.llm.load import load_model
    from ppf.llm.perplexity import measure, reference_of

    model, ids = load_model(str(place / "model")).model, blocks(place)
    measure(model, ids, reference_of(model, ids))


def fit(place: Path) -> None:
    """What a fit holds while it scores and measures, with one worker; two masks, one block."""
    from ppf.config import FitConfig
    from ppf.llm.collect import Wanted
    from ppf.llm.load import load_model
    from ppf.progress import Progress
    from ppf.recipes.lab import Lab
    from ppf.space.allocation import Allocation

    config = FitConfig(
        str(place / "model"), str(place / "study"), text=str(place / "text.txt"), score="taylor", seq_len=TOKENS, device="cpu",
        calibration_tokens=TOKENS, search_tokens=TOKENS, validation_tokens=0, test_tokens=TOKENS, workers=1, dtype="bfloat16",
    )  # fmt: skip
    Path(config.study).mkdir(exist_ok=True)
    loaded = load_model(config.model)
    kept = loaded.layout.units
    with Lab(loaded, config, Progress(True)) as lab:
        lab.open_study()
        lab.score()
        lab.run("masks", [Wanted(Allocation((kept * share).astype(int)), "probe", 1 - share) for share in (0.75, 0.5)], 0)


def prune(place: Path) -> None:
    """`ppf prune MODEL --plan ppf.json --out DIR`."""
    from ppf.cli import main

    command = ["prune", str(place / "model"), "--plan", str(place / "plan.json"), "--out", str(place / "smaller"), "--force"]
    if main(command):
        raise SystemExit(1)


def export(place: Path) -> None:
    """`ppf export DIR --gguf FILE` of what `prune` made."""
    from ppf.cli import main

    if main(["export", str(place / "smaller"), "--gguf", str(place / "smaller.gguf"), "--quant", "bf16", "--force"]):
        raise SystemExit(1)


STAGES: dict[str, Callable[[Path], None]] = {
    "imports": imports, "score": score, "evaluation": evaluation, "fit": fit, "prune": prune, "export": export,
}  # fmt: skip


def blocks(place: Path) -> np.ndarray:
    """Int[1, TOKENS] random ids."""
    return np.random.default_rng(0).integers(3, 2000, (1, TOKENS))


def watched(command: list[str]) -> dict[str, Any]:
    """Runs a command and watches it and its children.

    Returns:
        Bytes by name as in the module's table, and seconds.
    """
    found = dict.fromkeys(("peak", "own", "together"), 0)
    start = time.perf_counter()
    process = subprocess.Popen(command)
    while process.poll() is None:
        family = [process.pid, *children(process.pid)]
        with suppress(OSError, StopIteration):  # one has ended meanwhile
            found["peak"] = max(found["peak"], max([field(pid, "status", "VmHWM") for pid in family]))
            found["own"] = max(found["own"], sum([field(pid, "status", "RssAnon") for pid in family]))
            found["together"] = max(found["together"], sum([field(pid, "smaps_rollup", "Pss") for pid in family]))
        time.sleep(INTERVAL)
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return {**found, "seconds": round(time.perf_counter() - start, 1)}


def children(pid: int) -> list[int]:
    """Processes that a process started and that still run."""
    with suppress(OSError):
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def field(pid: int, file: str, name: str) -> int:
    """Bytes that /proc says of a process."""
    lines = Path(f"/proc/{pid}/{file}").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def measured(place: Path, names: list[str]) -> dict[str, Any]:
    """Peaks of each stage, and what they are held against."""
    files = [path.stat().st_size for path in (place / "model").glob("*.safetensors")]
    found: dict[str, Any] = {"weights": sum(files), "largest_shard": max(files), "tokens": TOKENS, "stages": {}}
    for name in names:
        found["stages"][name] = watched([sys.executable, __file__, "--stage", name, "--place", str(place)])
        print(name, {key: f"{value / 1e9:.2f} GB" for key, value in found["stages"][name].items() if key != "seconds"}, flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--place", help="a folder to keep and to use again; by default a temporary one")
    parser.add_argument("--stage", choices=STAGES, help="run this one here, unwatched")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(STAGES))
    parser.add_argument("--name", default="memory", help="of the results file")
    arguments = parser.parse_args()
    if arguments.stage:
        STAGES[arguments.stage](Path(arguments.place))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            place = Path(arguments.place or temporary)
            for step in (prepare, plan):
                if not (place / "plan.json").exists():
                    code = f"import memory, pathlib; memory.{step.__name__}(pathlib.Path({str(place)!r}), {arguments.seed})"
                    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE)
            write(arguments.name, arguments.seed, measured(place, arguments.stages))
