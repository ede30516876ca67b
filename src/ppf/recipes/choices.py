"""What measuring takes where a config leaves the choice: device, precision, length of a block, processes."""

import os
from pathlib import Path

import torch

from ppf.errors import InputError
from ppf.llm.masking import KEPT_BYTES
from ppf.llm.placement import Placement, free_bytes
from ppf.provenance import cores
from ppf.space.budget import parse_size

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 16_384, "mps": 4096}


_SHARE_OF_WEIGHTS = 0.8
"""Of a GPU's free memory; activations take the rest."""


def tokens_per_batch(device: torch.device) -> int:
    """How many tokens go through a model at once."""
    return TOKENS_PER_BATCH[device.type]


def choose_device(name: str) -> torch.device:
    """``auto`` is the first accelerator, or the CPU.

    Raises:
        InputError: No such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"--device must be one that is here; {name!r} came; use auto or cpu") from error
    if device.type not in TOKENS_PER_BATCH:
        raise InputError(f"--device must be a CPU, a CUDA or an MPS device; {name!r} came; use auto or cpu")
    return device


def choose_placement(name: str) -> Placement:
    """Where a model goes: one device, as ``choose_device`` says, or several, ``split`` or such as ``0=20GiB,1=20GiB``.

    Raises:
        InputError: No such device here, or no size.
    """
    if name != "split" and "=" not in name:
        return Placement(choose_device(name))
    count = torch.cuda.device_count()
    if name == "split":
        if not count:
            raise InputError("--device split needs GPUs; none is here; cpu=8GiB holds so much of a model in memory")
        limits = [(str(gpu), int(_SHARE_OF_WEIGHTS * free_bytes(gpu))) for gpu in range(count)]
    else:
        limits = [(place.strip(), parse_size(size)) for place, _, size in (part.partition("=") for part in name.split(","))]
    known = ["cpu"] if limits[0][0] == "cpu" else [str(gpu) for gpu in range(count)]
    for at, (place, _) in enumerate(limits):
        if place not in known or place in dict(limits[:at]):
            came = f"{place!r} came" if place not in known else f"{place} came twice"
            raise InputError(f"--device must name GPUs that are here, each once, or cpu alone; {came}; see nvidia-smi")
    return Placement(
        choose_device("cpu" if known == ["cpu"] else f"cuda:{limits[0][0]}"),
        tuple((place if place == "cpu" else int(place), size) for place, size in limits),
    )


def choose_whole(name: str, what: str) -> Placement:
    """One device, for what needs the whole model there.

    Raises:
        InputError: No such device here, or several.
    """
    where = choose_placement(name)
    if where.limits is not None:
        raise InputError(f"--device must be one for {what}; {name} came; use auto, cuda or cpu")
    return where


def choose_dtype(name: str, device: torch.device, checkpoint: torch.dtype) -> torch.dtype:
    """``auto`` is float32 on a CPU and the checkpoint's own elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else checkpoint
    return getattr(torch, name)


def choose_seq_len(asked: int | None, context: int) -> int:
    """Tokens a block: what is asked for, or half of what the model was made for, 2,048 at most.

    Raises:
        InputError: More than the model was made for.
    """
    if asked is not None and asked > context:
        raise InputError(f"--seq-len must be at most the model's context of {context} tokens; {asked} came; lower it")
    return asked or max(8, min(2048, context // 2))


def choose_workers(asked: int | None, model_bytes: int) -> int:
    """Measuring processes: what is asked for, or one a core as far as the free memory holds what each needs.

    That is the model, its states that are kept, a narrowed copy of as much of it as may stay, and the process itself.
    """
    if asked is not None:
        return asked
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (meminfo := Path("/proc/meminfo")).is_file():
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines() if ":" in line)
        free = int(lines.get("MemAvailable", f"{free // 1024} kB").split()[0]) * 1024
    return max(1, min(cores(), int(free / (1.1 * model_bytes + min(model_bytes, KEPT_BYTES) + 5e8))))


def check_named(name: str) -> None:
    """Refuses to guess the model of a study that was fitted to an object.

    Raises:
        InputError: It has no name.
    """
    if not name:
        raise InputError("the dense model must be named; this study was fitted to an object; give --model or model=")
