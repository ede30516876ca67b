"""export: any model as a GGUF file, and what there is to say of it."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ppf.config import ExportConfig, PruneConfig, QuantName
from ppf.errors import InputError, PPFError, UnsupportedError
from ppf.llm.gguf import Written, check_gguf, write_gguf
from ppf.llm.gguf_shape import shape_of, takes_biases
from ppf.llm.load import Checkpoint, LoadedModel
from ppf.llm.stored import outlined, stored
from ppf.llm.surgery import fill_buffers, smaller_skeleton
from ppf.llm.weights import readable
from ppf.provenance import own_name
from ppf.recipes.prune import Pruned
from ppf.space.allocation import Allocation
from ppf.space.layout import Layout


def export(config: ExportConfig, source: Checkpoint) -> dict[str, Any]:
    """Writes a GGUF file tensor by tensor; the model is never in memory.

    Args:
        config: Where and how.
        source: A dense or an exported model.

    Returns:
        As ``record_of``.

    Raises:
        InputError: The file exists.
        UnsupportedError: llama.cpp has no architecture for the model, or its files hold experts in a form that is not known.
        DamagedError: The check failed; nothing is left behind.
        ResourceError: A package is missing, or a file cannot be read or written.
    """
    path, name = Path(config.gguf), own_name(source.name)
    with readable(source.folder):
        weights = stored(source.folder, source.shell)
        model = outlined(source.shell, weights)
        written = write_gguf(model, source.tokenizer, path, config.quant, name, config.force, weights.__getitem__)
    return record_of(written, config.gguf)


def export_pruned(config: PruneConfig, pruned: Pruned) -> dict[str, Any] | None:
    """The GGUF file that goes with a pruned checkpoint in its folder, as ``record_of``; None if none is wanted.

    Raises:
        PPFError: As ``Pruned.save_gguf``; the message says that the folder is there.
    """
    if config.gguf is None:
        return None
    try:
        return record_of(pruned.save_gguf(config.gguf, _quant(config), config.force), config.gguf)
    except PPFError as error:
        raise type(error)(f"{error} (the folder {config.out} is written and whole)") from error
    except KeyboardInterrupt as stop:
        stop.args = (f"the folder {config.out} is written and whole, {config.gguf} is not written",)
        raise


def check_wish(
    config: ExportConfig | PruneConfig, loaded: LoadedModel | None = None, decided: tuple[Layout, Allocation] | None = None
) -> None:
    """Refuses what could not be written, before the work.

    Args:
        config: Where and how; without a GGUF file nothing is refused.
        loaded: The dense model, once it is there.
        decided: Its layout and what is going to stay of it, where that is known.

    Raises:
        InputError: The file exists, or its place is none for a file.
        UnsupportedError: llama.cpp has no architecture for the model.
        ResourceError: A package is missing.
    """
    if config.gguf is None:
        return
    folder = Path(config.out).resolve() if isinstance(config, PruneConfig) else None
    if folder == Path(config.gguf).resolve():
        raise InputError(
            f"--gguf must name another place than --out; both are {config.gguf}; name a file, such as {config.gguf}.gguf"
        )
    check_gguf(Path(config.gguf), _quant(config), config.force, folder)
    if loaded is not None:
        shape_of(loaded.model)
        if isinstance(config, PruneConfig) and config.compensate == "bias" and not takes_biases(loaded.model):
            family = loaded.layout.model_type
            raise UnsupportedError(f"--compensate bias with --gguf needs biases in llama.cpp's {family}; it has none; take ridge")
        if decided is not None:
            smaller = smaller_skeleton(loaded.model, *decided, loaded.dtype)
            fill_buffers(smaller, torch.device("cpu"))
            shape_of(smaller)


def _quant(config: ExportConfig | PruneConfig) -> QuantName:
    return config.quant or "f16"


def record_of(written: Written, file: str) -> dict[str, Any]:
    """What was written where, JSON-ready; ``"checked"`` says in words what was checked."""
    return {**asdict(written), "checked": str(written.check), "out": file}
