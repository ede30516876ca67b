"""compensate: cutting, and what makes up for what went: nothing, biases, or weights fitted again."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from ppf.config import CompensateName, Target
from ppf.errors import InputError
from ppf.llm.compensation import bias_params, reader_means
from ppf.llm.load import LoadedModel
from ppf.llm.placement import Placement, convert
from ppf.llm.ridge import PENALTY, fit_ridge
from ppf.llm.surgery import cut
from ppf.space.budget import parse_count, parse_size
from ppf.space.mask import Mask


def compensated(
    loaded: LoadedModel, mask: Mask, blocks: np.ndarray, method: CompensateName, where: Placement, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Cuts a model, and makes up for what went.

    Args:
        loaded: The dense model.
        mask: Which units stay.
        blocks: Int[B, L] calibration tokens; unused with ``"none"``.
        method: ``"none"``, ``"bias"`` or ``"ridge"``.
        where: Where to run the dense model over them.
        dtype: In which precision.

    Returns:
        The smaller model where the dense one was, in the dtype of its checkpoint; and a JSON-ready record of what was done.

    Raises:
        InputError: No calibration text, what is read of it is not finite, or the model is spread over several devices.
    """
    layout, home = loaded.layout, loaded.model.device
    if method == "none":
        return convert(cut(loaded.model, layout, mask), home, loaded.dtype), {"method": "none"}
    check_whole(method, where)
    model = loaded.on(where, dtype)
    record: dict[str, Any] = {"method": method, "tokens": int(blocks.size)}
    if method == "bias":
        smaller = cut(model, layout, mask, fill=reader_means(model, layout, blocks))
    else:
        smaller = cut(model, layout, mask, fitted=fit_ridge(model, layout, mask, blocks))
        record["penalty"] = PENALTY
    return convert(smaller, home, loaded.dtype), record


def check_whole(method: CompensateName, where: Placement) -> None:
    """Refuses what reads and fits weights that are not there.

    Raises:
        InputError: The model is spread over several devices.
    """
    if method != "none" and where.limits is not None:
        raise InputError(f"--compensate {method} needs the model on one device; several came; leave it out, or use auto or cpu")


def added_params(loaded: LoadedModel, method: CompensateName, kept: np.ndarray) -> int:
    """Parameters that a method of compensation adds to a cut model: biases where the dense model has none.

    Args:
        loaded: The dense model.
        method: As in ``compensated``.
        kept: Int[S] units that stay; those of the dense model give the most that it can be.
    """
    return bias_params(loaded.model, loaded.layout, kept) if method == "bias" else 0


def with_room(target: Target, added: int, bytes_per_param: float) -> Target:
    """A wished size that leaves room for parameters to be added; a ratio stays one of what is removed.

    Raises:
        InputError: They alone are more.
    """
    if not added:
        return target
    params, memory = target.params, target.memory
    if params is not None:
        params = str(parse_count(params) - added)
    if memory is not None:
        memory = f"{int(parse_size(memory) - added * bytes_per_param)}B"
    if any(text is not None and text.startswith(("-", "0")) for text in (params, memory)):
        raise InputError(f"the wished size must hold the {added:,} biases alone; it does not; ask for more")
    return replace(target, params=params, memory=memory)
