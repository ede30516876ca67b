"""Where a model lies: on one device, or spread over several, with what they cannot hold read from its files whenever it runs.

convert    moves a whole model, in place
copied     another model where this one goes
spread     accelerate moves activations from layer to layer; weights that fit nowhere stay as they were loaded: mapped from
           their files, so that the system keeps of them what its memory allows
"""

import copy
import ctypes
import gc
import importlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.errors import ResourceError
from ppf.llm.architectures import stack_of

_FILES = "disk"
_UNBOUNDED = 2**62


@dataclass(frozen=True)
class Placement:
    """Where a model goes.

    Attributes:
        device: Where token ids go, and without limits the whole model.
        limits: Bytes of weights that each device may hold, in the order in which they are filled: by number of a GPU, or
            ``"cpu"`` for this machine's memory, where there is no GPU among them. None keeps the model in one piece.
    """

    device: torch.device
    limits: tuple[tuple[int | str, int], ...] | None = None


def convert(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Moves a model and converts its weights, in place.

    Unlike ``model.to(dtype)`` it leaves the rotary frequencies as exact as transformers loads them; in bfloat16 they
    would turn far positions by wrong angles. The scale of Gemma's embeddings is rounded as it is there.
    """
    exact = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    model.to(device, dtype)
    _set_buffers(model, exact, dtype)
    return model


def take_weights(model: PreTrainedModel, other: PreTrainedModel) -> None:
    """Gives a model the weights of another that is the same but for their precision, in place; they share them then."""
    for own, new in zip(model.parameters(), other.parameters(), strict=True):
        own.data = new.data
    _set_buffers(model, {name: buffer.to(other.device) for name, buffer in model.named_buffers()}, other.dtype)


def free_weights(model: PreTrainedModel) -> None:
    """Lets the memory of a model's weights go, in place; it is good for nothing until it takes others."""
    for weight in model.parameters():
        weight.data = torch.empty(0, dtype=weight.dtype, device=weight.device)


def give_memory_back() -> None:
    """Lets the system have what was freed: glibc keeps it, and another process has more use for it."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def copied(model: PreTrainedModel, where: Placement, dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a model there; it stays where it is."""
    if where.limits is None:
        return convert(copy.deepcopy(model), where.device, dtype)
    return spread(model, where.device, dict(where.limits), dtype)


def spread(model: PreTrainedModel, device: torch.device, limits: Mapping[int | str, int], dtype: torch.dtype) -> PreTrainedModel:
    """A copy of a model that lies on several devices; weights that they do not hold are its own.

    Args:
        model: On the CPU; it stays as it is.
        device: As in ``Placement``, and so are ``limits``.
        limits: Bytes by device.
        dtype: To compute in.

    Raises:
        ResourceError: accelerate is not installed.
    """
    accelerate = _accelerate()
    gc.collect()  # a spread model that was let go holds its memory until then: accelerate's hooks make cycles
    weights = {name: weight.detach() for name, weight in model.named_parameters(remove_duplicate=False)}
    empty = {id(weight): _parameter(torch.empty_like(weight, device="meta", dtype=dtype)) for weight in model.parameters()}
    twin = copy.deepcopy(model, dict(empty))
    _set_buffers(twin, dict(model.named_buffers()), dtype)
    whole = sorted({type(layer).__name__ for layer in stack_of(twin)})  # what a layer adds to the stream lies where it does
    found = accelerate.infer_auto_device_map(twin, _bounds(limits), no_split_module_classes=whole, dtype=dtype)
    places = {name: _FILES if place == "cpu" != device.type else place for name, place in found.items()}
    _fill(twin, weights, places, dtype)
    return accelerate.dispatch_model(
        twin, places, main_device=_key(device), state_dict=weights, offload_index={}, skip_keys="past_key_values"
    )


def entry_of(model: nn.Module) -> torch.device:
    """The device that takes what a model, or one of its modules, reads: a weight that is not there now says nothing of it."""
    hook = getattr(model, "_hf_hook", None)
    if hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return next(model.parameters()).device


def weight_of(module: Any) -> torch.Tensor:
    """The weight of a linear layer or a router, also where it is read from its file only while it runs."""
    weight = module.weight.detach()
    return module._hf_hook.weights_map["weight"].to(weight.dtype) if weight.is_meta else weight


def is_spread(model: PreTrainedModel) -> bool:
    """Whether a model lies on several devices, or not as a whole on any."""
    return hasattr(model, "_hf_hook")


def free_bytes(gpu: int) -> int:
    """Bytes that weights can have on a GPU just now: what is free there, and what torch holds there and does not use."""
    gc.collect()  # as in ``spread``
    return torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)


def _set_buffers(model: PreTrainedModel, exact: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    for name, buffer in exact.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        scale = getattr(module, f"scalar_{leaf}", None)
        setattr(module, leaf, buffer if scale is None else torch.tensor(scale, device=buffer.device, dtype=dtype))


def _bounds(limits: Mapping[int | str, int]) -> dict[int | str, int]:
    """As accelerate takes them: where there are GPUs, all that they do not hold counts as the CPU's."""
    return dict(limits) if "cpu" in limits else {**limits, "cpu": _UNBOUNDED}


def _fill(twin: PreTrainedModel, weights: Mapping[str, torch.Tensor], places: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Gives a model the weights that stay on a device; tied ones stay one."""
    there: dict[int, nn.Parameter] = {}
    for name, empty in list(twin.named_parameters(remove_duplicate=False)):
        place = next(where for path, where in places.items() if not path or f"{name}.".startswith(f"{path}."))
        if place != _FILES:
            owner, _, leaf = name.rpartition(".")
            if id(empty) not in there:
                there[id(empty)] = _parameter(weights[name].to(place, dtype))
            setattr(twin.get_submodule(owner), leaf, there[id(empty)])


def _parameter(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _key(device: torch.device) -> int | str:
    """As accelerate calls a device."""
    return device.type if device.index is None else device.index


def _accelerate() -> Any:
    try:
        found = importlib.import_module("accelerate")
    except ImportError as error:
        raise ResourceError("spreading a model needs accelerate; it is missing; pip install 'ppf[spread]'") from error
    logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)  # it warns of weights that are not there now
    return found
