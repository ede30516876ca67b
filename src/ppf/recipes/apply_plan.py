"""apply_plan: the mask of an earlier export, or another tool's ratios, cut out of a model that has no study."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ppf.config import FitConfig, PruneConfig
from ppf.config.checks import check_idle
from ppf.decide import params_and_kept
from ppf.errors import DamagedError, InputError
from ppf.llm.depth import can_lose_sublayers, with_depth
from ppf.llm.export import CHECKED
from ppf.llm.load import LoadedModel, stored_digest
from ppf.llm.perplexity import evaluate
from ppf.llm.placement import Placement
from ppf.llm.scores import score_units
from ppf.llm.stored import stored
from ppf.llm.text import Text, TextSizes, load_text
from ppf.progress import Progress
from ppf.provenance import own_name
from ppf.recipes.choices import choose_dtype, choose_placement, choose_seq_len, tokens_per_batch
from ppf.recipes.compensate import added_params, check_whole, compensated
from ppf.recipes.export import check_wish, export_pruned
from ppf.recipes.lab import load_for
from ppf.recipes.prune import Pruned, check_out, dense_bytes, measured_of, told_of
from ppf.recipes.prune_files import open_stored, written
from ppf.space.allocation import allocate
from ppf.space.layout import Layout
from ppf.space.mask import Mask, select
from ppf.space.plan import is_export, mask_of, read_plan, wish_of
from ppf.space.policy import Policy

_SCORES = {False: "magnitude", True: "taylor"}
"""What orders the units under ratios: without text, and with it."""


def prune_by_plan(config: PruneConfig, progress: Progress) -> dict[str, Any]:
    """``ppf prune MODEL --plan FILE``: reads, cuts, measures if there is a text, and writes.

    Args:
        config: With a plan; its ``study`` is the model.
        progress: Shows what happens.

    Returns:
        The record of ``Pruned.plan`` without the mask, with ``bytes``, ``out`` and ``gguf``.

    Raises:
        InputError: A plan, a text or an output folder that cannot be used.
        DamagedError: A plan that is not whole or of another layout.
    """
    check_out(config.out, config.force, config.study)
    assert config.plan is not None  # the command line sends others to prune
    record = read_plan(Path(config.plan))
    check_wish(config)
    if (Path(config.study) / "study.json").is_file():
        raise InputError(f"with --plan, MODEL must be a model; {config.study} is a study; give the model that it was fitted to")
    if config.no_measure and not is_export(record):
        raise InputError("--no-measure needs the ppf.json of an export; ratios came, for which weights are scored; leave it out")
    if is_export(record) and config.text is None:
        check_idle(config, ("device",), "--text beside the plan of an export; it came alone")
    if is_export(record) and config.text is None and config.gguf is None:
        return _told(_stored(record, config, progress))
    loaded = load_for(config.study, progress)
    check_wish(config, loaded)
    pruned = apply_plan(record, loaded, config, progress)
    with progress.stage("writing and checking"):
        size = pruned.save_pretrained(config.out, config.force)
        gguf = export_pruned(config, pruned)
    weights = {"before": dense_bytes(loaded, loaded.dtype.itemsize), "after": size}
    return _told({**pruned.plan, "bytes": weights, "out": config.out, "gguf": gguf, "checked": CHECKED})


def _stored(record: Any, config: PruneConfig, progress: Progress) -> dict[str, Any]:
    """What an export kept, cut from the model's files."""
    _check_grid(config)
    source = open_stored(config.study, progress)
    source = replace(source, layout=_as_planned(record, source.shell, source.layout))
    mask = mask_of(record, source.layout)
    with progress.stage("reading"):
        digest, dtype = stored_digest(source), stored(source.folder, source.shell).dtype
    plan = _plan(record, source.name, digest, dtype, source.layout, mask, 0) | {"compensation": {"method": "none"}}
    return written(config, source, mask, plan, progress)


def _told(whole: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in whole.items() if key not in ("mask", "policy", "layout", "format")}


def apply_plan(record: Any, loaded: LoadedModel, config: PruneConfig, progress: Progress) -> Pruned:
    """Cuts what a plan says.

    Args:
        record: As ``read_plan`` gives it.
        loaded: The dense model, of the layout that the plan was made for.
        config: Text, compensation, device, and the grid for ratios.
        progress: Shows what happens.

    Raises:
        InputError: Ratios or a text that cannot be used.
        DamagedError: A mask that is not whole or of another layout.
    """
    where = choose_placement(config.device)
    check_whole(config.compensate, where)
    dtype = choose_dtype("auto", where.device, loaded.dtype)
    if is_export(record):
        _check_grid(config)
        loaded = replace(loaded, layout=_as_planned(record, loaded.model, loaded.layout))
        mask, wish = mask_of(record, loaded.layout), None
    else:
        wish = wish_of(record, loaded.layout, *config.grid)
    text = _text(config, loaded, where, dtype, progress)
    if wish is not None:
        with progress.stage("importance"):
            order = _order(loaded, text, where, dtype)
        mask = select(allocate(*wish, loaded.layout, *config.grid), order, loaded.layout)
    with progress.stage("cutting"):
        smaller, how = compensated(loaded, mask, _calibration(text), config.compensate, where, dtype)
    added = added_params(loaded, config.compensate, mask.allocation.kept)
    plan = _plan(record, loaded.name, loaded.digest, loaded.dtype, loaded.layout, mask, added) | {"compensation": how}
    if wish is not None:
        policy, budget = wish
        plan |= {"policy": policy.to_json(), "importance": {"method": order.method, "source": own_name(order.source)}}
        plan["ratio"] = {"asked": budget.ratio(loaded.layout), **plan["ratio"]}
    if text:
        with progress.stage("measuring the result"):
            plan |= _measured(loaded, smaller, text, where, dtype)
    return Pruned(smaller, loaded.tokenizer, None, plan)


def _as_planned(record: Any, model: PreTrainedModel, layout: Layout) -> Layout:
    """The layout of depth, if that is what an export was planned in."""
    if record.get("layout") == layout.fingerprint or not can_lose_sublayers(model):
        return layout
    deep = with_depth(model, layout)
    return deep if record.get("layout") == deep.fingerprint else layout


def _measured(loaded: LoadedModel, smaller: PreTrainedModel, text: Text, where: Placement, dtype: torch.dtype) -> dict[str, Any]:
    """Perplexity of both models on the text's test part, and their speed, as in an export from a study."""
    measured, speeds = measured_of(loaded, smaller, text.test, where, dtype)
    dense = evaluate(loaded.on(where, dtype), text.test, tokens_per_batch(where.device))
    return {
        **told_of(measured, speeds, dense.blocks),
        "dense": {"log_ppl": dense.log_ppl, "ppl": float(np.exp(dense.log_ppl))},
        "protocol": {
            "text": own_name(text.name),
            "seq_len": int(text.test.shape[1]),
            "tokens": measured.tokens,
            "dtype": str(dtype).removeprefix("torch."),
        },
    }


def _check_grid(config: PruneConfig) -> None:
    if config.target.tp != 1 or config.target.align is not None:
        raise InputError("--align and --tp must come without the plan of an export; one came; its mask stays as it is")


def _text(config: PruneConfig, loaded: LoadedModel, where: Placement, dtype: torch.dtype, progress: Progress) -> Text | None:
    if config.text is None:
        return None
    with progress.stage("text"):
        model = loaded.on(where, dtype)
        length = choose_seq_len(None, model.config.max_position_embeddings)
        sizes = TextSizes(length, FitConfig.calibration_tokens, length, 0, FitConfig.test_tokens)
        return load_text(config.text, loaded.tokenizer, sizes, FitConfig.seed, model)


def _calibration(text: Text | None) -> np.ndarray:
    return text.calibration if text else np.zeros((0, 1), dtype=np.int64)


def _order(loaded: LoadedModel, text: Text | None, where: Placement, dtype: torch.dtype) -> Any:
    model = loaded.on(where, dtype)
    return score_units(model, loaded.layout, _calibration(text), _SCORES[bool(text)], text.name if text else "", FitConfig.seed)


def _plan(record: Any, name: str, digest: str, dtype: torch.dtype, layout: Layout, mask: Mask, added: int) -> dict[str, Any]:
    """What goes into ``ppf.json`` whatever the plan is."""
    kept = mask.allocation.kept
    params, sites = params_and_kept(layout, kept)
    plan: dict[str, Any] = {
        "format": 1,
        "model": {
            "name": own_name(name), "digest": digest, "type": layout.model_type, "bytes_per_param": dtype.itemsize,
        },
        "layout": layout.fingerprint,
        "ratio": {"met": float(layout.ratio(kept))},
        "kept": sites,
        "params": {"before": layout.total, "after": params + added},
        "mask": [np.packbits(bits).tobytes().hex() for bits in mask.bits],
        "from": {"kind": "ratios"},
    }  # fmt: skip
    if is_export(record):
        source, compensation = record.get("model"), record.get("compensation")
        if not isinstance(source, dict) or not isinstance(compensation, dict):
            raise DamagedError("a plan must say of which model it is and what compensates; it does not; export it again")
        method = compensation.get("method")
        plan["from"] = {"kind": "export", "same_model": source.get("digest") == digest, "compensated": method != "none"}
        if "policy" in record:
            plan["policy"] = _policy(record["policy"], len(layout.sites)).to_json()
    return plan


def _policy(record: Any, sites: int) -> Policy:
    policy = Policy.from_json(record) if isinstance(record, dict) else None
    if policy is None or len(policy.keep) != sites:
        raise DamagedError(f"a plan's policy must have {sites} sites; it has others; export it again")
    return policy
