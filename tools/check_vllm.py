"""Does vLLM answer as transformers does? Loads an exported folder with vLLM's Transformers backend and compares.

    python tools/check_vllm.py smaller
    python tools/check_vllm.py smaller --dtype bfloat16 --tp 2

It needs vLLM and a device that vLLM runs on. The machine that this project is tested on has neither, so it was not run there
with vLLM itself; `tests/llm/test_vllm_contract.py` tests what the backend asks of the folder.
"""

import argparse
import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ppf.llm.auto import register
from ppf.printing import print_table

PROMPTS = (
    "The file must be opened before it can be read.",
    "If the argument is omitted, the function returns",
    "In the year of our Lord one thousand eight hundred and",
    "A list is a sequence of",
)
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}
"""Largest difference of a log-probability, nats, that rounding explains."""


@dataclass(frozen=True)
class Answer:
    """What a runtime says of one prompt.

    Attributes:
        prompt: Log-probability of each token of the prompt but the first.
        tokens: The greedy continuation.
        generated: Log-probability of each token of it.
    """

    prompt: list[float]
    tokens: list[int]
    generated: list[float]


@torch.inference_mode()
def of_transformers(model: PreTrainedModel, ids: list[int], count: int) -> Answer:
    """transformers' answer, without a cache: each step runs the whole sequence."""
    tokens = list(ids)
    while len(tokens) < len(ids) + count:
        logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0, -1]
        tokens.append(int(logits.argmax()))
    logits = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0, :-1].float()
    found = logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:], device=model.device)[:, None])[:, 0].tolist()
    return Answer(found[: len(ids) - 1], tokens[len(ids) :], found[len(ids) - 1 :])


def missing(config: PreTrainedConfig) -> str:
    """What the backend wants that a folder does not have, with the way out; empty if it has all."""
    if hasattr(config, "expert_sizes"):
        return "must have experts of one width, which vLLM fuses; those of a pruned mixture differ; use transformers"
    headless = [str(index) for index, own in enumerate(config.per_layer_config) if getattr(own, "num_attention_heads", 1) == 0]
    if headless:
        return f"must have attention in every layer; {', '.join(headless)} have none; use transformers, or fit without --depth"
    return ""


def of_vllm(folder: str, prompts: list[list[int]], count: int, dtype: str, tp: int, memory: float) -> list[Answer]:
    """vLLM's answers through its Transformers backend."""
    vllm = importlib.import_module("vllm")
    model = vllm.LLM(
        model=folder, model_impl="transformers", trust_remote_code=True, dtype=dtype, tensor_parallel_size=tp, enforce_eager=True,
        gpu_memory_utilization=memory, seed=0,
    )  # fmt: skip
    greedy = vllm.SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    answers = []
    for found in model.generate([{"prompt_token_ids": ids} for ids in prompts], greedy):
        asked = zip(found.prompt_token_ids[1:], found.prompt_logprobs[1:], strict=True)
        best = found.outputs[0]
        made = zip(best.token_ids, best.logprobs, strict=True)
        answers.append(Answer([at[token].logprob for token, at in asked], list(best.token_ids), [at[t].logprob for t, at in made]))
    return answers


def compared(ours: Answer, theirs: Answer) -> dict[str, float]:
    """How far two answers agree.

    Returns:
        ``prompt``, the largest difference of a log-probability in the prompt, nats; ``same``, how many greedy tokens agree
        before the first that does not; ``generated``, the largest difference among those.
    """
    pairs = zip(ours.tokens, theirs.tokens, strict=True)
    same = next((place for place, (one, other) in enumerate(pairs) if one != other), len(ours.tokens))
    return {
        "prompt": _most(ours.prompt, theirs.prompt),
        "same": same,
        "generated": _most(ours.generated[:same], theirs.generated[:same]),
    }


def _most(ours: list[float], theirs: list[float]) -> float:
    return max((abs(one - other) for one, other in zip(ours, theirs, strict=True)), default=0.0)


def report(prompts: list[str], found: list[dict[str, float]], count: int, dtype: str) -> bool:
    """Prints one table; whether every difference is one of rounding. A tie may part greedy tokens, so those are only shown."""
    print_table(
        f"vLLM beside transformers, {dtype}; differences of log-probabilities in nats",
        ["prompt", "in the prompt", "greedy tokens alike", "in those"],
        [
            [text[:40], f"{one['prompt']:.2e}", f"{one['same']} of {count}", f"{one['generated']:.2e}"]
            for text, one in zip(prompts, found, strict=True)
        ],
    )
    good = max(max(one["prompt"], one["generated"]) for one in found) <= TOLERANCES[dtype]
    print(f"{'within' if good else 'BEYOND'} {TOLERANCES[dtype]:g}, which rounding explains")
    return good


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--tokens", type=int, default=32, help="greedy tokens a prompt")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32")
    parser.add_argument("--tp", type=int, default=1, help="devices; prune with the same --tp")
    parser.add_argument("--memory", type=float, default=0.5, help="share of the device's memory for vLLM")
    chosen = parser.parse_args(arguments)
    if importlib.util.find_spec("vllm") is None:
        print("error: vLLM must be installed; it is not; pip install vllm where there is a device for it", file=sys.stderr)
        return 5
    if not (Path(chosen.folder) / "config.json").is_file():
        print(f"error: a model folder must hold config.json; {chosen.folder} does not; give what ppf prune wrote", file=sys.stderr)
        return 2
    register()
    if lack := missing(AutoConfig.from_pretrained(chosen.folder)):
        print(f"error: for vLLM {chosen.folder} {lack}", file=sys.stderr)
        return 2
    tokenizer = AutoTokenizer.from_pretrained(chosen.folder)
    prompts = [tokenizer(text)["input_ids"] for text in PROMPTS]
    model = AutoModelForCausalLM.from_pretrained(chosen.folder, dtype=getattr(torch, chosen.dtype)).eval()
    ours = [of_transformers(model, ids, chosen.tokens) for ids in prompts]
    theirs = of_vllm(chosen.folder, prompts, chosen.tokens, chosen.dtype, chosen.tp, chosen.memory)
    found = [compared(*pair) for pair in zip(ours, theirs, strict=True)]
    return 0 if report(list(PROMPTS), found, chosen.tokens, chosen.dtype) else 1


if __name__ == "__main__":
    sys.exit(main())
