"""Weights that stay in their files: read one tensor at a time, written one tensor at a time.

Stored            the tensors of a folder by the model's names, each mapped from its file when it is asked for
outlined          a model with its vectors alone, of whose matrices only the shapes are there
running_stored    a model that has its weights while it runs only, one module after another
write_stored      a folder's weight files from tensors that come one after another
"""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from ppf.llm.surgery import fill_buffers
from ppf.llm.weights import DTYPES, Place, places_of

_INDEX = "model.safetensors.index.json"
_PATTERN = "model{suffix}.safetensors"
_LARGEST_FILE = "50GB"
"""As transformers' ``save_pretrained`` has it, so that both write the same file."""
_ALIGNED = 8


@dataclass(frozen=True, eq=False)
class Stored:
    """The weights of a folder.

    Attributes:
        parts: By the model's name of a tensor where its parts lie, in the order of its rows.
        dtype: What a model that is loaded from the folder has; tensors of another are converted.
    """

    parts: Mapping[str, tuple[Place, ...]]
    dtype: torch.dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        """A tensor on the CPU. It is mapped: only what is used of it is read, and the file is let go with it."""
        found = []
        for place in self.parts[name]:
            with safe_open(place.path, framework="pt") as file:
                found.append(file.get_tensor(place.key))
        return (found[0] if len(found) == 1 else torch.cat(found)).to(self.dtype)


def stored(folder: Path, shell: PreTrainedModel) -> Stored:
    """The weights of a folder that ``check_weights`` found good.

    Args:
        folder: Where they lie.
        shell: The model on the meta device.

    Raises:
        UnsupportedError: Experts that the files hold in a form that is not known.
    """
    parts = places_of(folder, shell)
    first = next(iter(parts.values()))[0].dtype
    said = shell.config.dtype
    tied = {name: parts[other] for name, other in (shell.all_tied_weights_keys or {}).items() if name not in parts}
    return Stored({**parts, **tied}, said if isinstance(said, torch.dtype) else DTYPES[first])


def outlined(shell: PreTrainedModel, weights: Stored) -> PreTrainedModel:
    """Gives a model its buffers and its vectors, norms and biases, in place; of its matrices it knows shape and dtype.

    Args:
        shell: The model on the meta device.
        weights: Its own.
    """
    fill_buffers(shell.eval(), torch.device("cpu"))
    for path, module in shell.named_modules():
        own = dict(module.named_parameters(recurse=False))
        _show(module, {name: weights[f"{path}.{name}"] if of.ndim == 1 else of.to(weights.dtype) for name, of in own.items()})
    shell.tie_weights()
    return shell


@contextmanager
def running_stored(shell: PreTrainedModel, weights: Callable[[str], torch.Tensor]) -> Iterator[None]:
    """Lets a model without weights run, in float32 on the CPU: each module has its own for as long as it runs.

    Of the embeddings only the rows that are asked for are there. Outside of its run a module shows zeros of its weights' shape
    that take no memory.

    Args:
        shell: The model on the meta device; afterwards it is good for nothing.
        weights: Gives a tensor by its name, on any device.
    """
    fill_buffers(shell.float().eval(), torch.device("cpu"))
    with ExitStack() as stack:
        for path, module in shell.named_modules():
            own = {name: f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)}
            if not own:
                continue
            empty = {name: torch.zeros(()).expand(getattr(module, name).shape) for name in own}
            enter, leave = _hooks(own, empty, weights, module is shell.get_input_embeddings())
            _show(module, empty)
            stack.callback(module.register_forward_pre_hook(enter).remove)
            stack.callback(module.register_forward_hook(leave).remove)
        yield


def _hooks(
    own: Mapping[str, str], empty: Mapping[str, torch.Tensor], weights: Callable[[str], torch.Tensor], embeds: bool
) -> tuple[Callable, Callable]:
    def enter(module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        tensors = {name: weights(path) for name, path in own.items()}
        if embeds:
            rows, places = inputs[0].unique(return_inverse=True)
            tensors, inputs = {"weight": tensors["weight"][rows.to(tensors["weight"].device)]}, (places,)
            module.padding_idx = None  # else it must be one of the rows; without gradients it does nothing
        _show(module, {name: tensor.to("cpu", torch.float32) for name, tensor in tensors.items()})
        return inputs

    def leave(module: nn.Module, *_: object) -> None:
        _show(module, empty)

    return enter, leave


def _show(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))


def write_stored(folder: Path, shell: PreTrainedModel, tensor: Callable[[str], torch.Tensor]) -> list[str]:
    """Writes safetensors files as ``save_pretrained`` would, holding one tensor at a time.

    Args:
        folder: Where to.
        shell: The model to write, on the meta device.
        tensor: Gives a tensor by its name.

    Returns:
        The names of the tensors written; of tied ones the first alone.
    """
    tied = set(shell.all_tied_weights_keys or {})
    shapes = {name: shape for name, shape in shell.state_dict().items() if name not in tied}
    split = split_torch_state_dict_into_shards(shapes, filename_pattern=_PATTERN, max_shard_size=_LARGEST_FILE)
    for file, names in split.filename_to_tensors.items():
        _write(folder / file, {name: shapes[name] for name in sorted(names)}, tensor)
    if split.is_sharded:
        metadata = {"total_parameters": shell.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return list(shapes)


def _write(path: Path, shapes: Mapping[str, torch.Tensor], tensor: Callable[[str], torch.Tensor]) -> None:
    """One file: the length of its header, the header, the tensors one behind the other."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel() * shape.element_size()
        header[name] = {"dtype": names[shape.dtype], "shape": list(shape.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(tensor(name).contiguous().view(-1).view(torch.uint8).numpy().data)
