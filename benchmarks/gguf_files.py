"""What do GGUF files of a dense and a pruned model give in llama.cpp: perplexity beside transformers', and prompt speed?

The name is not gguf.py: beside this file, that would hide the package. Needs pip install 'ppf[llamacpp]'.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does
os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

QUANTS = ("f16", "q8_0")
RATIO = 0.3
ALIGNS = (1, 32)
STAND_IN = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 6,
    "vocab_size": 4096, "max_position_embeddings": 512,
}  # fmt: skip


def load(file: str, tokens: int, **options: Any) -> Any:
    """A file in llama.cpp, one thread, on the CPU."""
    import llama_cpp

    return llama_cpp.Llama(file, n_ctx=tokens, n_batch=tokens, n_threads=1, n_gpu_layers=0, verbose=False, **options)


def perplexity(request: dict[str, Any]) -> dict[str, float]:
    """Log-perplexity of token blocks, nats/token, as ``ppf eval`` defines it."""
    blocks = np.load(request["blocks"], allow_pickle=False)
    model, losses = load(request["file"], blocks.shape[1], logits_all=True), []
    for ids in blocks:
        model.reset()
        model.eval(ids.tolist())
        logits = model.scores[: len(ids) - 1].astype(np.float64)
        top = logits.max(axis=1)
        norm = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
        losses.append(float((norm - logits[np.arange(len(ids) - 1), ids[1:]]).mean()))
    return {"log_ppl": float(np.mean(losses))}


def speed(request: dict[str, Any]) -> dict[str, list[float]]:
    """Seconds of one prompt, for each file, in turns: what disturbs the machine disturbs all of them alike."""
    ids = np.load(request["blocks"], allow_pickle=False)[0].tolist()
    models = {name: load(file, len(ids)) for name, file in request["files"].items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn in range(request["repeats"] + 2):
        first = turn % len(models)  # each file comes first as often as the others
        for name in [*models][first:] + [*models][:first]:
            models[name].reset()
            start = time.perf_counter()
            models[name].eval(ids)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def in_process(task: str, request: dict[str, Any]) -> Any:
    """The task in a process of its own: a bad file would end this one."""
    command = [sys.executable, __file__, "--task", task]
    done = subprocess.run(command, input=json.dumps(request), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp stopped: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def flops(model: Any, tokens: int) -> float:
    """Multiplications and additions of a prompt: all matrices of the layers, whole score tables, one row of logits."""
    matrices = sum(module.weight.numel() for layer in model.model.layers for module in layer.modules() if hasattr(module, "bias"))
    widths = sum(layer.self_attn.q_proj.out_features for layer in model.model.layers)
    return 2.0 * tokens * matrices + 4.0 * tokens**2 * widths + 2.0 * model.lm_head.weight.numel()


def models_of(study: str) -> tuple[dict[str, Any], Any, np.ndarray]:
    """The dense and the pruned models, their tokenizer, and the test blocks of the study."""
    from ppf.config import Target
    from ppf.decide import Decider
    from ppf.llm.load import load_model, quiet_transformers
    from ppf.llm.surgery import cut
    from ppf.llm.text import Text

    quiet_transformers()
    decider = Decider(study)
    loaded = load_model(decider.study.record["model"]["name"])
    models: dict[str, Any] = {"dense": loaded.model}
    for align in ALIGNS:
        mask = decider.decide(Target(ratio=RATIO, align=align)).mask
        models[f"pruned, align {align}"] = cut(loaded.model, loaded.layout, mask)
    return models, loaded.tokenizer, Text.load(decider.study.path("text"), decider.layout.fingerprint).test


def stand_in(seed: int) -> dict[str, Any]:
    """A random Llama of a common width, dense and pruned to layers that differ; its speed is real, its answers mean nothing."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from ppf.llm.architectures import layout_of_model
    from ppf.llm.surgery import cut
    from ppf.space.allocation import allocate
    from ppf.space.budget import Budget
    from ppf.space.importance import Importance
    from ppf.space.mask import select
    from ppf.space.policy import Policy

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    dense = AutoModelForCausalLM.from_config(LlamaConfig(**STAND_IN)).eval()
    layout = layout_of_model(dense)
    importance = Importance(tuple(rng.random(units) for units in layout.units), "random", "none")
    policy = Policy(rng.normal(0.7, 0.15, len(layout.sites)))
    models: dict[str, Any] = {"dense": dense}
    for align in ALIGNS:
        kept = allocate(policy, Budget.from_ratio(RATIO, layout, align), layout, align)
        models[f"pruned, align {align}"] = cut(dense, layout, select(kept, importance, layout))
    return models


def timed(rows: list[dict[str, Any]], models: dict[str, Any], files: dict[str, str], blocks: Path, repeats: int) -> None:
    """Adds to each row what was timed, and what the removed operations promise."""
    tokens = np.load(blocks, allow_pickle=False).shape[1]
    seconds = in_process("speed", {"files": files, "blocks": str(blocks), "repeats": repeats})
    for row in rows:
        own, dense = (np.array(seconds[f"{name}, {row['quant']}"]) for name in (row["model"], "dense"))
        row["tokens_per_second"], row["speedup"] = _spread(tokens / own), _spread(dense / own)
        row["promised"] = flops(models["dense"], tokens) / flops(models[row["model"]], tokens)


def written(models: dict[str, Any], tokenizer: Any, folder: Path) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A file for each model and type: what there is to say of each, and where they are."""
    from ppf.llm.gguf import write_gguf

    folder.mkdir()
    rows, files = list[dict[str, Any]](), dict[str, str]()
    for name, model in models.items():
        for quant in QUANTS:
            file = folder / f"{len(rows)}.gguf"
            found = write_gguf(model, tokenizer, file, quant, name)
            files[f"{name}, {quant}"] = str(file)
            row = {"model": name, "quant": quant, "arch": found.arch, "bytes": found.bytes, "logits": found.check.difference}
            rows.append({**row, "matrices": found.check.matrices, "fallbacks": found.check.fallbacks})
    return rows, files


def measure(study: str, repeats: int, work: Path) -> dict[str, Any]:
    import torch

    from ppf.llm.perplexity import evaluate
    from ppf.llm.placement import convert

    models, tokenizer, text = models_of(study)
    blocks = work / "blocks.npy"
    np.save(blocks, text)
    rows, files = written(models, tokenizer, work / "own")
    for row in rows:
        exact = convert(models[row["model"]], torch.device("cpu"), torch.float32)
        request = {"file": files[f"{row['model']}, {row['quant']}"], "blocks": str(blocks)}
        row["ppl"] = float(np.exp(in_process("perplexity", request)["log_ppl"]))
        row["ppl_transformers"] = float(np.exp(evaluate(exact, text).log_ppl))
    timed(rows, models, files, blocks, repeats)
    larger = stand_in(0)
    wide, files = written(larger, tokenizer, work / "stand-in")
    timed(wide, larger, files, blocks, repeats)
    versions = {package.replace("-", "_"): version(package) for package in ("llama-cpp-python", "gguf")}
    sizes = {"ratio": RATIO, "repeats": repeats, "prompt": int(text.shape[1]), "tokens": int(text.size)}
    return {"rows": rows, "stand_in": {"shape": STAND_IN, "rows": wide}, **sizes, **versions}


def _spread(values: np.ndarray) -> dict[str, float]:
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    return {"median": round(float(median), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", help="a fitted study")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--task", choices=("perplexity", "speed"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps({"perplexity": perplexity, "speed": speed}[arguments.task](json.load(sys.stdin))))
        return
    if arguments.study is None:
        parser.error("--study DIR is needed: the folder of a fitted study")
    from ppf.artifact import read_json
    from record import write

    with tempfile.TemporaryDirectory() as work:
        result = measure(arguments.study, arguments.repeats, Path(work))
    write("gguf", read_json(Path(arguments.study) / "study.json")["settings"]["seed"], result)


if __name__ == "__main__":
    main()
