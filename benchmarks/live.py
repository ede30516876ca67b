"""How fast is the live model: switching, generating beside the cut model, and the API under load?

switching   ref-a through its decider, and a 1 B Llama with random weights (bfloat16): milliseconds until the new size runs
elastic     the elastic model against the cut one at the same allocation, in turns: tokens/s by the wall clock and by the
            processor's, which other work on the machine does not slow down; of ref-a, of the 1 B Llama, and of a phi3 and a
            gpt_neox of about 90 M random parameters, whose projections are fused
api         GET /api/policy over kept connections, each ratio asked once
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, GPTNeoXConfig, LlamaConfig, Phi3Config, PreTrainedConfig, PreTrainedModel

from ppf.config import Target
from ppf.decide import Decider
from ppf.llm.architectures import layout_of_model, skeleton
from ppf.llm.elastic import ElasticModel
from ppf.llm.load import load_model, quiet_transformers
from ppf.llm.placement import convert
from ppf.llm.surgery import cut
from ppf.space.allocation import Allocation, allocate
from ppf.space.budget import Budget
from ppf.space.importance import Importance
from ppf.space.mask import select
from ppf.space.policy import Policy
from record import write

LLAMA_1B = LlamaConfig(
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=True,
)
MEDIUM = {"hidden_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 16, "vocab_size": 8192, "eos_token_id": 2}
FUSED = {
    "phi3": Phi3Config(**MEDIUM, intermediate_size=3072, num_key_value_heads=8, pad_token_id=0),
    "gpt_neox": GPTNeoXConfig(**MEDIUM, intermediate_size=4096),
}
"""Families whose projections are fused, so that what stays of them is blocks of a tensor and no one prefix."""
PROMPT, NEW = 128, 32


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles and 99th percentile."""
    marks: np.ndarray = np.quantile(values, [0.5, 0.25, 0.75, 0.99])
    return {name: round(float(mark), 4) for name, mark in zip(("median", "q1", "q3", "p99"), marks, strict=True)}


def milliseconds(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def random_model(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model of random weights, without the memory of a second one."""
    model = skeleton(config).to(dtype).to_empty(device="cpu")
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
    base = model.base_model
    base.rotary_emb = type(base.rotary_emb)(model.config)
    model.tie_weights()
    return model.eval()


def switching(elastic: ElasticModel, sizes: Callable[[float], Allocation], seed: int, count: int = 300) -> dict:
    """From a ratio to the views of another size, at random ratios; and that no memory was taken for them."""
    ratios = np.random.default_rng(seed).uniform(0.0, 0.6, count)
    allocations = [sizes(float(ratio)) for ratio in ratios]
    before = resident()
    switches = [milliseconds(partial(elastic.set_allocation, one)) for one in allocations]
    grown = resident() - before

    def decided(ratio: float) -> None:
        elastic.set_allocation(sizes(ratio))

    with_decision = [milliseconds(partial(decided, float(ratio))) for ratio in ratios]
    return {"views_ms": summary(switches), "decision_and_views_ms": summary(with_decision), "resident_bytes_grown": grown}


def resident() -> int:
    """Bytes of memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def decode(model: PreTrainedModel, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds of one-token steps behind a prompt, by the wall and by the processor."""
    cache = DynamicCache(config=model.config)
    model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(new):
        model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    return time.perf_counter() - wall, time.process_time() - processor


@torch.inference_mode()
def prompt(model: PreTrainedModel, ids: torch.Tensor, _: int) -> tuple[float, float]:
    """Seconds of one pass over a prompt."""
    wall, processor = time.perf_counter(), time.process_time()
    model(input_ids=ids, use_cache=False)
    return time.perf_counter() - wall, time.process_time() - processor


def beside(elastic: ElasticModel, small: PreTrainedModel, allocation: Allocation, runs: int, new: int) -> dict:
    """Tokens/s of the elastic and of the cut model, in turns, and the ratio of their times in each turn."""
    ids = torch.randint(3, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    result, view = {}, elastic.view(allocation)
    for name, what, tokens in (("generation", decode, new), ("prompt", prompt, PROMPT)):
        found: dict[str, list[tuple[float, float]]] = {"cut": [], "elastic": []}
        for run in range(runs + 2):
            for kind in ("cut", "elastic") if run % 2 else ("elastic", "cut"):
                if kind == "cut":
                    seconds = what(small, ids, new)
                else:
                    with elastic.at(view) as model:
                        seconds = what(model, ids, new)
                if run >= 2:  # the first runs warm up
                    found[kind].append(seconds)
        result[name] = {
            clock: {
                **{kind: {"tokens_per_second": summary([tokens / one[index] for one in found[kind]])} for kind in found},
                "elastic_over_cut": summary([a[index] / b[index] for a, b in zip(found["elastic"], found["cut"], strict=True)]),
            }
            for index, clock in enumerate(("wall", "processor"))
        }
    return result


def small_model(decider: Decider, seed: int, runs: int) -> dict:
    """ref-a, in both dtypes."""
    result: dict = {}
    for dtype in (torch.float32, torch.bfloat16):
        loaded, twin = load_model("ref-a"), load_model("ref-a")
        dense = convert(loaded.model, torch.device("cpu"), dtype)
        elastic = ElasticModel(convert(twin.model, torch.device("cpu"), dtype), twin.layout, decider.importance)

        def sizes(ratio: float) -> Allocation:
            return decider.decide(Target(ratio=ratio)).allocation

        name = str(dtype).removeprefix("torch.")
        result[name] = {"switching": switching(elastic, sizes, seed), "beside_cut": {}}
        for ratio in (0.3, 0.6):
            decision = decider.decide(Target(ratio=ratio))
            small = cut(dense, loaded.layout, decision.mask)
            result[name]["beside_cut"][str(ratio)] = beside(elastic, small, decision.allocation, runs, NEW)
    return result


def random_allocations(
    model: PreTrainedModel, seed: int
) -> tuple[Callable[[float], Allocation], Callable[[Allocation], PreTrainedModel], Callable[[], ElasticModel]]:
    """Uniform allocations of a model, the cut model of one, and the elastic model, which takes the model over."""
    layout, rng = layout_of_model(model), np.random.default_rng(seed)
    importance = Importance(tuple(rng.random(units) for units in layout.units), "random", "none")
    return (
        lambda ratio: allocate(Policy.uniform(layout), Budget.from_ratio(ratio, layout), layout),
        lambda allocation: cut(model, layout, select(allocation, importance, layout)),
        lambda: ElasticModel(model, layout, importance),
    )


def large_model(seed: int, runs: int) -> dict:
    """1 B parameters, random, uniform allocations."""
    model = random_model(LLAMA_1B, torch.bfloat16, seed)
    sizes, cut_at, elastic_of = random_allocations(model, seed)
    allocation = sizes(0.3)
    small, elastic = cut_at(allocation), elastic_of()
    timed = {"parameters": elastic.layout.total, "switching": switching(elastic, sizes, seed)}
    return {**timed, "beside_cut": {"0.3": beside(elastic, small, allocation, runs, 4)}}


def fused_models(seed: int, runs: int) -> dict:
    """Families of fused projections, random, in float32: the elastic model beside the cut one."""
    result: dict = {}
    for family, config in FUSED.items():
        model = random_model(config, torch.float32, seed)
        sizes, cut_at, elastic_of = random_allocations(model, seed)
        allocations = {ratio: sizes(ratio) for ratio in (0.3, 0.6)}
        small = {ratio: cut_at(allocation) for ratio, allocation in allocations.items()}
        elastic = elastic_of()
        result[family] = {
            "parameters": elastic.layout.total,
            "beside_cut": {str(ratio): beside(elastic, small[ratio], one, runs, NEW) for ratio, one in allocations.items()},
        }
    return result


async def asked(
    port: int,
    connections: int,
    seconds: float,
    seed: int,
    is_over: Callable[[], bool] = lambda: False,
    answers: list[tuple[float, bytes]] | None = None,
) -> dict:
    """Requests a second and their times, over so many kept connections; client and server share this machine.

    It ends when the seconds are up or ``is_over`` says so. ``answers`` takes up which ratio got which body.
    """
    times: list[float] = []
    wrong = 0

    async def client(number: int) -> None:
        nonlocal wrong
        rng = np.random.default_rng([seed, number])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        end = time.perf_counter() + seconds
        while time.perf_counter() < end and not is_over():
            start, ratio = time.perf_counter(), rng.uniform(0.02, 0.6)
            writer.write(f"GET /api/policy?ratio={ratio:.6f} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n\r\n".encode())
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
            body = await reader.readexactly(size)
            if answers is not None:
                answers.append((round(ratio, 6), body))
            times.append(1e3 * (time.perf_counter() - start))
            wrong += not head.startswith(b"HTTP/1.1 200")
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(connections)))
    spent = time.perf_counter() - start
    return {"requests_per_second": round(len(times) / spent, 1), "errors": wrong, "milliseconds": summary(times)}


def processor_ms(pid: int) -> float:
    """Milliseconds of processor that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return 1e3 * (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def beside_generation(port: int, connections: int, seconds: float, seed: int) -> dict:
    """``asked`` while two requests generate without a pause."""
    made = 0

    async def generate() -> None:
        nonlocal made
        body = json.dumps({"model": "ref-a", "prompt": "The", "max_tokens": 200, "stream": True, "stop": "never"}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            try:
                while line := await reader.readline():
                    made += line.startswith(b"data: {")
            finally:
                writer.close()

    generating = [asyncio.create_task(generate()) for _ in range(2)]
    await asyncio.sleep(1)
    result = await asked(port, connections, seconds, seed)
    for task in generating:
        task.cancel()
    await asyncio.gather(*generating, return_exceptions=True)
    return {**result, "tokens_per_second": round(made / (seconds + 1), 1)}


def api(study: str, seed: int, seconds: float) -> dict:
    """The policy route of a server process, without a model and beside one that generates; and the decider itself."""
    decider, rng = Decider(study), np.random.default_rng(seed)
    ratios = rng.uniform(0.02, 0.6, 2000)
    result: dict = {"decision_ms": summary([decider.decide(Target(ratio=float(ratio))).milliseconds for ratio in ratios])}
    for name, options, runs in (
        ("decisions alone", ["--no-model"], [(asked, 1), (asked, 8), (asked, 64)]),
        ("with a model", [], [(asked, 8), (beside_generation, 8)]),
    ):
        start = time.perf_counter()
        command = [sys.executable, "-m", "ppf", "serve", study, "--port", "0", *options]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                port = int(server.stdout.readline().rsplit(":", 1)[1])
                found: dict = {"ready_seconds": round(time.perf_counter() - start, 2)}
                for what, connections in runs:
                    before = processor_ms(server.pid)
                    times = asyncio.run(what(port, connections, seconds, seed))
                    spent = (processor_ms(server.pid) - before) / (times["requests_per_second"] * seconds)
                    label = f"{connections} connections" + ("" if what is asked else ", two requests generating")
                    found[label] = times if what is beside_generation else {**times, "server_processor_ms": round(spent, 3)}
                stop = time.perf_counter()
                server.terminate()
                server.wait(timeout=30)
                found["stop_seconds"] = round(time.perf_counter() - stop, 2)
            finally:
                server.kill()
        result[name] = found
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--study", required=True, help="a fitted study of ref-a")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--no-large", action="store_true", help="leave out the 1 B model, which takes 6 GB of memory")
    arguments = parser.parse_args()
    quiet_transformers()
    found = {
        "load_average": round(os.getloadavg()[0], 2),
        "api": api(arguments.study, arguments.seed, arguments.seconds),
        "ref-a": small_model(Decider(arguments.study), arguments.seed, arguments.runs),
        "fused": fused_models(arguments.seed, arguments.runs),
    }
    if not arguments.no_large:
        found["1B"] = large_model(arguments.seed, max(3, arguments.runs // 3))
    write("live", arguments.seed, found)
