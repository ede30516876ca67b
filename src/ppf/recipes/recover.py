"""recover: a folder -> training beside the dense model -> the same shape, measured before and after -> verified export."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppf.artifact import check_room
from ppf.config import RecoverConfig
from ppf.errors import InputError
from ppf.llm.export import weight_bytes
from ppf.llm.load import EMBEDDED, LoadedModel, resolve
from ppf.llm.perplexity import Evaluation, evaluate, summarise
from ppf.llm.placement import Placement, convert, copied
from ppf.llm.recover import Training, check_adapters, usual_lr
from ppf.llm.recover import recover as train
from ppf.llm.surgery import savable_generation_config
from ppf.llm.text import Text, TextSizes, load_text
from ppf.progress import Progress
from ppf.provenance import own_name
from ppf.recipes.choices import choose_dtype, choose_seq_len, choose_whole, tokens_per_batch
from ppf.recipes.lab import load_for
from ppf.recipes.prune import Pruned, check_out
from ppf.recipes.teacher import check_teacher, find_teacher, plan_of

RANK = 16
"""Of the adapters, unless another is asked for."""
_STEPS, _MOST_TOKENS_A_STEP = 200, 16_384
_MOST_LOGITS = 2**28
"""That are made at once: a gigabyte in float32, of which training holds several."""


def recover_folder(config: RecoverConfig, progress: Progress) -> dict[str, Any]:
    """``ppf recover DIR``: loads, trains, measures and writes.

    Args:
        config: What to do.
        progress: Shows what happens.

    Returns:
        The record ``recovered`` of the new ``ppf.json``, with ``out``, ``bytes`` and ``params``.

    Raises:
        InputError: A model, a text or a folder that cannot be used, or a loss that is no longer finite.
        DamagedError: The dense model is another than the one that was pruned, or a file is not whole.
        ResourceError: PEFT is missing, or the dense model cannot be fetched.
    """
    folder = resolve(config.model)
    out = _out(config, folder)
    if not config.full:
        check_adapters()
    choose_whole(config.device, "training")
    plan = plan_of(folder)
    loaded = load_for(config.model, progress)
    check_room(Path(out), weight_bytes(folder))
    teacher = find_teacher(config.teacher, plan, progress)
    if teacher is not None and teacher.folder is not None:
        check_out(out, config.force, teacher.folder)
    recovered = recover(config, loaded, plan, teacher, progress)
    with progress.stage("writing and checking"):
        size = recovered.save_pretrained(out, config.force)
    return {**recovered.plan["recovered"], "params": loaded.layout.total, "bytes": size, "out": out}


def recover(
    config: RecoverConfig, loaded: LoadedModel, plan: Mapping[str, Any], teacher: LoadedModel | None, progress: Progress
) -> Pruned:
    """Trains a copy of a model.

    Args:
        config: Text, tokens, method.
        loaded: The pruned model; it stays as it is.
        plan: What its ``ppf.json`` says.
        teacher: The dense model; None learns from the text alone.
        progress: Shows what happens.

    Returns:
        The trained model in the dtype of its checkpoint; its plan is the given one with a record ``recovered``.

    Raises:
        InputError: A text or a teacher that does not fit, or a loss that is no longer finite.
        DamagedError: The model gives no finite losses as it is.
    """
    where = choose_whole(config.device, "training")
    device = where.device
    dtype = precision(config.dtype, device, loaded.dtype)
    check_teacher(loaded, teacher)
    text = _text(config, loaded, teacher, where, dtype, progress)
    how = _training(config, loaded, text, device, dtype)
    dense = None if teacher is None else teacher.on(where, dtype)
    with progress.stage("measuring before"):
        before = evaluate(loaded.on(where, dtype), text.test, tokens_per_batch(device))
        best = None if dense is None else evaluate(dense, text.test, tokens_per_batch(device))
    student = convert(copy.deepcopy(loaded.model), device, _weights_dtype(how, device))
    with progress.stage("training", how.steps) as advance:
        trained = train(student, loaded.layout, np.concatenate([text.calibration, text.search]), dense, how, advance)
    trained = convert(trained, torch.device("cpu"), loaded.dtype)
    trained.generation_config = savable_generation_config(loaded.model)
    with progress.stage("measuring after"):
        after = evaluate(copied(trained, where, dtype), text.test, tokens_per_batch(device))
    record = _record(config, how, text, teacher) | _figures(before, after, best)
    record["seconds"] = round(progress.seconds["training"], 1)
    return Pruned(trained, loaded.tokenizer, None, _with_record(plan, record))


def _out(config: RecoverConfig, folder: Path) -> str:
    """Where the result goes: nowhere near what it is made from."""
    if config.out is None and (folder in EMBEDDED.values() or not Path(config.model).is_dir()):
        raise InputError(f"--out must be given for a model that is no folder here; none came for {config.model}; name a new folder")
    place = config.out or f"{Path(os.path.abspath(config.model))}-recovered"
    check_out(place, config.force, folder)
    if folder in Path(place).resolve().parents:
        raise InputError(f"an output folder must lie outside {config.model}; {place} came; choose another place")
    return place


def _text(
    config: RecoverConfig,
    loaded: LoadedModel,
    teacher: LoadedModel | None,
    where: Placement,
    dtype: torch.dtype,
    progress: Progress,
) -> Text:
    """Calibration and search parts to train on, the test part for the figures, as a fit deals them out."""
    contexts = [one.model.config.max_position_embeddings for one in (loaded, teacher) if one is not None]
    length = choose_seq_len(config.seq_len, min(contexts))
    third = config.tokens // 3  # the share that the calibration part has of both
    sizes = TextSizes(length, third, config.tokens - third, 0, config.test_tokens)
    with progress.stage("text"):
        model = None if teacher is None else teacher.on(where, dtype)
        return load_text(config.text, loaded.tokenizer, sizes, config.seed, model, config.test_text)


def _training(config: RecoverConfig, loaded: LoadedModel, text: Text, device: torch.device, dtype: torch.dtype) -> Training:
    length = text.search.shape[1]
    sequences = max(1, (config.batch or min(config.tokens // _STEPS, _MOST_TOKENS_A_STEP)) // length)
    steps = max(1, round(config.tokens / (sequences * length)))
    at_once = min(tokens_per_batch(device), _MOST_LOGITS // loaded.model.config.vocab_size)
    rank = None if config.full else config.lora_rank or RANK
    lr = config.lr or usual_lr(loaded.model.config.hidden_size, rank)
    return Training(rank, lr, steps, sequences, max(1, at_once // length), dtype, config.seed)


def precision(name: str, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """What is computed in: as elsewhere, but not in float16, which is too narrow for gradients."""
    dtype = choose_dtype(name, device, checkpoint)
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _weights_dtype(how: Training, device: torch.device) -> torch.dtype:
    """Trained weights are float32; those that stay may be as small as the computation on an accelerator, where memory is short."""
    return torch.float32 if how.rank is None or device.type == "cpu" else how.dtype


def _record(config: RecoverConfig, how: Training, text: Text, teacher: LoadedModel | None) -> dict[str, Any]:
    """How it was trained and how it was measured."""
    length = int(text.test.shape[1])
    return {
        "method": "full" if how.rank is None else "lora",
        "rank": how.rank,
        "teacher": None if teacher is None else {"name": own_name(teacher.name), "digest": teacher.digest},
        "text": own_name(config.text),
        "tokens": how.steps * how.sequences * length,
        "distinct_tokens": int(text.calibration.size + text.search.size),
        "steps": how.steps,
        "batch": how.sequences * length,
        "lr": how.lr,
        "seed": how.seed,
        "protocol": {
            "text": own_name(config.test_text or config.text),
            "seq_len": length,
            "tokens": int(text.test.size),
            "dtype": str(how.dtype).removeprefix("torch."),
        },
    }


def _figures(before: Evaluation, after: Evaluation, dense: Evaluation | None) -> dict[str, Any]:
    """Perplexities, and what was gained in nats/token, on the same blocks; ``share`` is that of the damage that is gone."""
    gain = summarise(before.blocks - after.blocks, before.tokens)
    damage = None if dense is None else before.log_ppl - dense.log_ppl
    return {
        "dense": None if dense is None else _perplexity(dense),
        "before": _perplexity(before),
        "after": _perplexity(after),
        "gain": {"log_ppl": gain.log_ppl, "interval": list(gain.interval)},
        "share": gain.log_ppl / damage if damage is not None and damage > 0 else None,
    }


def _perplexity(found: Evaluation) -> dict[str, Any]:
    ends = [float(np.exp(end)) for end in found.interval]
    return {"log_ppl": found.log_ppl, "ppl": float(np.exp(found.log_ppl)), "interval": ends}


def _with_record(plan: Mapping[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """A plan with what was done last; what was done before that goes into the record, so that nothing is forgotten."""
    earlier = [plan["recovered"]] if "recovered" in plan else []
    return {"format": 1, **plan, "recovered": {**record, "earlier": earlier}}
