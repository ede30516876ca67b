"""prune: decision -> (refinement) -> surgery -> true measurement -> verified export."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ppf.artifact import check_new_folder, check_writable
from ppf.config import CompensateName, QuantName, Target
from ppf.decide import Decider, Decision
from ppf.errors import DamagedError, InputError
from ppf.llm.export import export, weight_bytes
from ppf.llm.gguf import Written, write_gguf
from ppf.llm.load import Checkpoint, LoadedModel
from ppf.llm.perplexity import Evaluation, evaluate, summarise
from ppf.llm.placement import Placement, copied, entry_of
from ppf.llm.text import Text
from ppf.progress import Progress
from ppf.provenance import own_name
from ppf.recipes.choices import choose_placement, tokens_per_batch
from ppf.recipes.compensate import added_params, check_whole, compensated, with_room
from ppf.recipes.refine import check_refinable, searched
from ppf.space.mask import Mask

_SPEED_RUNS = 5
_SPEED_TOKENS = 1024


@dataclass(frozen=True, eq=False)
class Pruned:
    """A smaller model and all that is known of it.

    Attributes:
        model: A causal LM of its own class, in the dtype of the dense checkpoint.
        tokenizer: The dense model's.
        decision: What was decided; None where a plan was applied.
        plan: The JSON-ready record that goes with it as ``ppf.json``.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    decision: Decision | None
    plan: dict[str, Any]

    def save_pretrained(self, out: str | Path, force: bool = False) -> int:
        """Writes a Hugging Face folder, after checking that transformers loads it and answers as the model in memory does.

        Args:
            out: A new folder.
            force: Replace an earlier export of that name.

        Returns:
            Bytes of the weight files.

        Raises:
            InputError: The folder exists.
            DamagedError: The reload check failed; nothing is left behind.
        """
        return export(self.model, self.tokenizer, self.plan, Path(out), force)

    def save_gguf(self, out: str | Path, quant: QuantName = "f16", force: bool = False) -> Written:
        """Writes a GGUF file for llama.cpp, after reading it back, and with llama-cpp-python after comparing logits.

        Args:
            out: A new file.
            quant: Number type of the matrices.
            force: Replace a file of that name.

        Returns:
            What the file holds and what was checked.

        Raises:
            InputError: The file exists.
            UnsupportedError: llama.cpp has no architecture for the model.
            DamagedError: The check failed; nothing is left behind.
            ResourceError: A package is missing.
        """
        return write_gguf(self.model, self.tokenizer, Path(out), quant, f"{self.plan['model']['name']} pruned", force)


def prune(
    folder: str | Path,
    loaded: LoadedModel,
    target: Target,
    device: str,
    candidates: int,
    progress: Progress,
    compensate: CompensateName = "none",
) -> Pruned:
    """Makes a smaller model.

    Args:
        folder: The study.
        loaded: Its dense model.
        target: How small.
        device: Where to measure.
        candidates: How many policies to measure before choosing; 0 takes the agent's as it comes.
        progress: Shows what happens.
        compensate: What makes up for what goes; the prediction knows nothing of it.

    Raises:
        InputError: More than the floors allow, candidates of nested policies, or a study that is not fitted.
        DamagedError: A study of another model.
    """
    loaded.spread.clear()  # an earlier one's memory is free, too
    where = choose_placement(device)
    check_whole(compensate, where)
    decider = decider_for(folder, loaded.digest, target, candidates)
    loaded = replace(loaded, layout=decider.layout)  # with floors of 0 where its study has them
    most = added_params(loaded, compensate, loaded.layout.units)
    target = with_room(target, most, decider.study.record["model"]["bytes_per_param"])
    decision = decider.decide(target)
    if candidates:
        decision = searched(decider, decision, loaded, target, device, candidates, progress)
    smaller, how, told = _cut(decider, decision.mask, loaded, compensate, where, progress)
    plan = plan_for(decider, decision, bool(candidates)) | told
    plan = _with_compensation(plan, how, added_params(loaded, compensate, decision.allocation.kept))
    return Pruned(smaller, loaded.tokenizer, decision, plan | {"nested": target.nested, "rounding": decider.rounding(target)})


def _cut(
    decider: Decider, mask: Mask, loaded: LoadedModel, compensate: CompensateName, where: Placement, progress: Progress
) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Any]]:
    """The smaller model, how it was compensated, and what measuring it on the study's test text told."""
    text = Text.load(decider.study.path("text"), decider.layout.fingerprint)
    dtype = getattr(torch, decider.study.record["dtype"])
    with progress.stage("cutting"):
        smaller, how = compensated(loaded, mask, text.calibration, compensate, where, dtype)
    with progress.stage("measuring the result"):
        measured, speeds = measured_of(loaded, smaller, text.test, where, dtype)
    dense = decider.study.record["dense"]["test"].get("blocks")  # one of before they were kept has none
    return smaller, how, told_of(measured, speeds, dense)


def decider_for(folder: str | Path, digest: str, target: Target, candidates: int) -> Decider:
    """The study, if it is of the model of this digest."""
    check_refinable(target, bool(candidates))
    decider = Decider(folder)
    if decider.study.record["model"]["digest"] != digest:
        name = decider.study.record["model"]["name"]
        raise DamagedError(f"{folder} must be a study of this model; it is one of {name} as it was then; give its own model")
    return decider


def measured_of(
    loaded: LoadedModel, smaller: PreTrainedModel, blocks: np.ndarray, where: Placement, dtype: torch.dtype
) -> tuple[Evaluation, dict[str, float]]:
    """Perplexity of the small model on some blocks, and tokens/s of both models.

    Limits are for one model: with them the dense one comes where the small one was.
    """
    apart = where.limits is not None
    if apart:
        loaded.spread.clear()
    models = [copied(smaller, where, dtype)]
    evaluation, speeds = evaluate(models[0], blocks, tokens_per_batch(where.device)), list[float]()
    if apart:
        speeds += tokens_per_second(models, blocks)
        models.clear()
    speeds += tokens_per_second([*models, loaded.on(where, dtype)], blocks)
    return evaluation, {"before": speeds[1], "after": speeds[0]}


@torch.inference_mode()
def tokens_per_second(models: list[PreTrainedModel], blocks: np.ndarray) -> list[float]:
    """Prompt tokens a second, median of five interleaved runs after a warm-up."""
    rows = max(1, _SPEED_TOKENS // blocks.shape[1])
    ids = torch.from_numpy(np.ascontiguousarray(blocks[:rows])).long().to(entry_of(models[0]))
    seconds: list[list[float]] = [[] for _ in models]
    for run in range(_SPEED_RUNS + 1):
        for model, times in zip(models, seconds, strict=True):
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False).logits[0, -1, 0].item()
            if run:
                times.append(time.perf_counter() - start)
    return [ids.numel() / statistics.median(times) for times in seconds]


def plan_for(decider: Decider, decision: Decision, refined: bool) -> dict[str, Any]:
    """What a decision says of itself in ``ppf.json``, before anything is measured."""
    study, report = decider.study, decider.report
    model = study.record["model"]
    text = study.record["settings"]["test_text"] or study.record["settings"]["text"]
    return {
        "format": 1,
        "model": {**model, "name": own_name(model["name"])},
        "layout": decider.layout.fingerprint,
        "context": study.context,
        "importance": {"method": decider.importance.method, "source": own_name(decider.importance.source)},
        "refined": refined,
        **decision.to_json(decider.layout),
        "dense": {"log_ppl": decider.dense_log_ppl, "ppl": float(np.exp(decider.dense_log_ppl))},
        "protocol": {
            "text": own_name(text),
            "seq_len": study.record["seq_len"],
            "tokens": study.record["dense"]["test"]["tokens"],
            "dtype": study.record["dtype"],
        },
        "report": {
            "predictor": report["predictor"],
            "heldout": report["heldout"][report["predictor"]],
            "samples": report["samples"],
        },
        "policy": decision.policy.to_json(),
        "mask": [np.packbits(bits).tobytes().hex() for bits in decision.mask.bits],
    }


def told_of(measured: Evaluation, speeds: dict[str, float], dense: Sequence[float] | np.ndarray | None) -> dict[str, Any]:
    """What a plan says of measuring; with the dense model's Float[B] on the same blocks, what was lost, nats/token, paired."""
    log_ppl = measured.log_ppl
    found: dict[str, Any] = {"log_ppl": log_ppl, "ppl": float(np.exp(log_ppl)), "interval": _ppl(measured.interval)}
    if dense is not None and len(dense) == len(measured.blocks):
        rise = summarise(measured.blocks - np.asarray(dense), measured.tokens)
        found["above_dense"] = {"log_ppl": rise.log_ppl, "interval": list(rise.interval)}
    return {
        "measured": found,
        "tokens_per_second": {name: round(value, 1) for name, value in speeds.items()},
    }


def _with_compensation(plan: dict[str, Any], how: dict[str, Any], added: int) -> dict[str, Any]:
    """The record with what made up for what went, of which its prediction knows nothing, and the parameters that it added."""
    params = {**plan["params"], "after": plan["params"]["after"] + added}
    return {**plan, "compensation": how, "params": params, "predicted": {**plan["predicted"], "compensation": "none"}}


def _ppl(interval: tuple[float, float]) -> list[float]:
    return [float(np.exp(end)) for end in interval]


def dense_bytes(loaded: LoadedModel | Checkpoint, bytes_per_param: float) -> int:
    """Bytes of the dense model's weight files; of its parameters if it has no files."""
    return weight_bytes(loaded.folder) if loaded.folder else int(loaded.layout.total * bytes_per_param)


def check_out(out: str, force: bool, source: str | Path) -> None:
    """Refuses an output folder at once rather than after the work.

    Args:
        out: Where the result is wanted.
        force: Replace an earlier export there.
        source: The study or the model that it is made from.

    Raises:
        InputError: It exists, or it is the source or holds it.
        ResourceError: It cannot be written.
    """
    place, kept = Path(out).resolve(), Path(source).resolve()
    if place == kept or place in kept.parents:
        raise InputError(f"an output folder must not be {source} or hold it; {out} came; choose another name")
    check_new_folder(Path(out), force)
    check_writable(Path(out))
