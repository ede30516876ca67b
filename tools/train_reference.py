"""Trains a small reference model from a folder of .txt files: corpus folder in, Hugging Face folder out.

    python tools/train_reference.py BOOKS OUT --family llama --tokens 24e6
    python tools/train_reference.py BOOKS OUT --family qwen3 --tokens 24e6

The tokenizer is that of the embedded model, the documentation inside CPython (`pydocs` buckets 3 to 9) is mixed in, and
what the benchmarks use (buckets 0 to 2, books outside the folder) is never seen. Muon trains the matrices, AdamW the rest;
the learning rate is constant after a warm-up and falls to 0 over the last part of the tokens, so that a run can be made
longer or shorter while it lasts. Sequences have half of the context until it begins to fall, and all of it from then on.
Every batch is drawn from the seed and the step, so a run that was stopped goes on as if it had not been.
"""

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, Qwen3Config
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from ppf.llm import pydocs

EMBEDDED = Path(__file__).parents[1] / "src" / "ppf" / "models" / "ref-a"
PYDOCS_BUCKETS = range(3, 10)
SHAPES = {
    "llama": (LlamaConfig, {"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 384}),
    "qwen3": (Qwen3Config, {"num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 352}),
}
WARM_UP = 100
SAVE_EVERY = 300


@dataclass(frozen=True)
class Run:
    """How to train.

    Attributes:
        batch: Tokens a step.
        context: Tokens a sequence at most.
        tokens: Tokens of the whole run.
        decay: Share of the tokens over which the learning rate falls to 0.
        muon, adam: Learning rates.
        seed: Of the weights and the batches.
    """

    batch: int
    context: int
    tokens: float
    decay: float
    muon: float
    adam: float
    seed: int

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return math.ceil(self.tokens / self.batch)

    def scale(self, step: int) -> float:
        """Learning rate at a step, as a share of its constant value."""
        return min(1.0, (step + 1) / WARM_UP, (self.steps - step) / (self.decay * self.steps))

    def seq_len(self, step: int) -> int:
        """Tokens a sequence at a step."""
        return self.context if step >= (1 - self.decay) * self.steps else self.context // 2


def token_stream(corpus: Path, cache: Path) -> np.ndarray:
    """UInt16[T]: all documents, an end-of-text token behind each; kept in a file, since encoding takes a minute."""
    if cache.exists():
        return np.load(cache)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    documents = [path.read_text(encoding="utf-8") for path in sorted(corpus.glob("*.txt"))]
    documents += [text for bucket in PYDOCS_BUCKETS for text in pydocs.documents(bucket)]
    encoded = tokenizer(documents, add_special_tokens=False, verbose=False)["input_ids"]
    stream = np.concatenate([np.array([*ids, tokenizer.eos_token_id], dtype=np.uint16) for ids in encoded])
    np.save(cache, stream)
    return stream


def plain_attention(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, **options: float
) -> tuple[torch.Tensor, None]:
    """Attention in three plain steps, all in bfloat16: twice as fast as the fused kernel for heads this small."""
    assert mask is not None  # the eager mask is one
    batch, heads, length, width = query.shape
    with torch.autocast("cpu", enabled=False):
        query, key, value, mask = (part.bfloat16() for part in (query * options["scaling"], key, value, mask))
        grouped = query.reshape(batch, key.shape[1], -1, width)
        scores = (grouped @ key.transpose(-1, -2)).view(batch, key.shape[1], -1, length, length)
        weights = (scores + mask[:, :, None]).softmax(-1).view(batch, key.shape[1], -1, length)
        return (weights @ value).view(batch, heads, length, width).transpose(1, 2), None


def new_model(family: str, layers: int, hidden: int, context: int, seed: int) -> PreTrainedModel:
    """An untrained model; the matrices that write into the residual stream start smaller."""
    torch.manual_seed(seed)
    config_class, shape = SHAPES[family]
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    config = config_class(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, head_dim=16, tie_word_embeddings=True,
        max_position_embeddings=context, bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, **shape,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="plain")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_((2 * layers) ** -0.5)
    return model


def optimisers(model: PreTrainedModel, run: Run) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    named = list(model.named_parameters())
    matrices = [parameter for name, parameter in named if parameter.ndim == 2 and "embed" not in name]
    rest = [parameter for name, parameter in named if parameter.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=run.muon, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=run.adam, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def batch_of(stream: np.ndarray, run: Run, step: int) -> torch.Tensor:
    """Int[B, L + 1]: sequences that start anywhere, drawn from the seed and the step."""
    length = run.seq_len(step)
    starts = np.random.default_rng([run.seed, step]).integers(0, len(stream) - length - 1, run.batch // length)
    return torch.from_numpy(np.stack([stream[start : start + length + 1] for start in starts]).astype(np.int64))


def keep(path: Path, model: PreTrainedModel, learners: list[torch.optim.Optimizer], step: int) -> None:
    """Writes everything that training goes on with, whole or not at all."""
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    for place, learner in enumerate(learners):
        for index, slots in learner.state_dict()["state"].items():
            tensors |= {f"learner.{place}.{index}.{name}": torch.as_tensor(value) for name, value in slots.items()}
    save_file(tensors, path.with_suffix(".new"), metadata={"step": str(step)})
    os.replace(path.with_suffix(".new"), path)


def restore(path: Path, model: PreTrainedModel, learners: list[torch.optim.Optimizer]) -> int:
    """Reads it back; the step to go on with."""
    slots: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in learners]
    with safe_open(path, "pt") as saved, torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved.get_tensor(f"model.{name}"))
        for key in saved.keys():  # noqa: SIM118 (the file is no dict)
            if key.startswith("learner."):
                _, place, index, name = key.split(".")
                slots[int(place)].setdefault(int(index), {})[name] = saved.get_tensor(key)
        step = int(saved.metadata()["step"])
    for learner, state in zip(learners, slots, strict=True):
        learner.load_state_dict({**learner.state_dict(), "state": state})
    return step


def train(model: PreTrainedModel, stream: np.ndarray, run: Run, out: Path) -> None:
    """Trains to the end, from the last state saved in ``out`` if there is one."""
    learners = optimisers(model, run)
    state, log = out / "state.safetensors", out / "log.jsonl"
    first = restore(state, model, learners) if state.exists() else 0
    model.train()
    start, seen = time.perf_counter(), 0
    for step in range(first, run.steps):
        batch = batch_of(stream, run, step)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for learner, rate in zip(learners, (run.muon, run.adam), strict=True):
            for group in learner.param_groups:
                group["lr"] = rate * run.scale(step)
            learner.step()
            learner.zero_grad(set_to_none=True)
        seen += run.batch
        if (step + 1) % 20 == 0:
            speed = seen / (time.perf_counter() - start)
            line = {"step": step + 1, "of": run.steps, "loss": round(loss.item(), 4), "tokens_per_second": round(speed)}
            print(json.dumps(line), flush=True)
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == run.steps:
            keep(state, model, learners, step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", choices=SHAPES, default="llama")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=float, default=24e6)
    parser.add_argument("--decay", type=float, default=0.3)
    parser.add_argument("--muon", type=float, default=4e-3)
    parser.add_argument("--adam", type=float, default=4e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    AttentionInterface.register("plain", plain_attention)
    AttentionMaskInterface.register("plain", eager_mask)
    arguments.out.mkdir(parents=True, exist_ok=True)
    run = Run(arguments.batch, arguments.context, arguments.tokens, arguments.decay, arguments.muon, arguments.adam, arguments.seed)
    stream = token_stream(arguments.corpus, arguments.out / "tokens.npy")
    model = new_model(arguments.family, arguments.layers, arguments.hidden, arguments.context, arguments.seed)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(stream):,} tokens of text, {run.steps} steps")
    train(model, stream, run, arguments.out)
    model.set_attn_implementation("sdpa")
    model.to(torch.bfloat16).save_pretrained(arguments.out / "model")
    AutoTokenizer.from_pretrained(EMBEDDED).save_pretrained(arguments.out / "model")


if __name__ == "__main__":
    main()
