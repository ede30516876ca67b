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


def measure(study: str, repeats: int, work: Path) -> dict[str, Any]:
    import torch

    from ppf.llm.gguf import write_gguf
    from ppf.llm.load import convert
    from ppf.llm.perplexity import evaluate

    models, tokenizer, blocks = models_of(study)
    np.save(work / "blocks.npy", blocks)
    rows, files, promised = [], {}, {}
    for name, model in models.items():
        promised[name] = flops(models["dense"], blocks.shape[1]) / flops(model, blocks.shape[1])
        for quant in QUANTS:
            files[f"{name}, {quant}"] = str(work / f"{len(files)}.gguf")
            written = write_gguf(model, tokenizer, Path(files[f"{name}, {quant}"]), quant, name)
            found = in_process("perplexity", {"file": files[f"{name}, {quant}"], "blocks": str(work / "blocks.npy")})
            check, ppl = written.check, float(np.exp(found["log_ppl"]))
            rows.append(
                {
                    "model": name, "quant": quant, "arch": written.arch, "bytes": written.bytes, "logits": check.difference,
                    "matrices": check.matrices, "fallbacks": check.fallbacks, "ppl": ppl,
                }
            )  # fmt: skip
        exact = convert(model, torch.device("cpu"), torch.float32)
        for row in rows[-len(QUANTS) :]:
            row["ppl_transformers"] = float(np.exp(evaluate(exact, blocks).log_ppl))
    seconds = in_process("speed", {"files": files, "blocks": str(work / "blocks.npy"), "repeats": repeats})
    for row in rows:
        own, dense = (np.array(seconds[f"{name}, {row['quant']}"]) for name in (row["model"], "dense"))
        row["tokens_per_second"] = _spread(blocks.shape[1] / own)
        row["speedup"], row["promised"] = _spread(dense / own), promised[row["model"]]
    return {
        "rows": rows, "ratio": RATIO, "repeats": repeats, "prompt": int(blocks.shape[1]), "tokens": int(blocks.size),
        "llama_cpp_python": version("llama-cpp-python"), "gguf": version("gguf"),
    }  # fmt: skip


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
