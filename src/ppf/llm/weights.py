"""The weight files of a folder, checked by their headers alone; only safetensors is looked at."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ppf.artifact import MAX_HEADER
from ppf.errors import DamagedError, PPFError, ResourceError, UnsupportedError
from ppf.llm.pruned_model import Experts

_RENAMED = {"gpt_neox": ("embed_out.", "lm_head."), "mixtral": (".block_sparse_moe.", ".mlp.")}
"""By model type, what files call otherwise than the model does, and how it does."""
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By the name that safetensors has for it."""
_EXPERT_PARTS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("w2",),)}
"""By matrix of an expert what files may call its parts."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies.

    Attributes:
        path: The file.
        key: Its name there.
        shape: As the file says.
        dtype: As the file calls it.
    """

    path: Path
    key: str
    shape: list[int]
    dtype: str


def check_weights(folder: Path, shell: PreTrainedModel) -> None:
    """Compares the headers of the weight files with the shapes that the config asks for, before anything is loaded.

    Raises:
        DamagedError: A tensor is missing, extra or of another shape, a file is cut, or only pickles are there.
    """
    found = {name: place.shape for name, place in _places(folder, shell).items()}
    wanted = {name: list(tensor.shape) for name, tensor in shell.state_dict().items()}
    if _fused(shell):  # how files hold experts is a matter between them and transformers, which says what it misses
        found, wanted = ({name: shape for name, shape in of.items() if ".experts." not in name} for of in (found, wanted))
    shared = set(shell.all_tied_weights_keys or {})
    for name, shape in wanted.items():
        if name not in found and name not in shared:
            raise DamagedError(f"{folder} must hold the weight {name}; it is missing; fetch the model again")
        if name in found and found[name] != shape:
            raise DamagedError(f"{name} must have shape {shape} as config.json says; it has {found[name]}; fetch the model again")
    ignored = re.compile("|".join(["rotary_emb.inv_freq$", *(shell._keys_to_ignore_on_load_unexpected or ())]))
    extra = sorted(name for name in set(found) - set(wanted) if not ignored.search(name))
    if extra:
        raise DamagedError(f"{folder} must hold only weights of its config; {extra[0]} is extra; is config.json its own?")


def places_of(folder: Path, shell: PreTrainedModel) -> dict[str, tuple[Place, ...]]:
    """Where the tensors of a model lie, by the model's names; the parts of one that files hold in parts are in its order of rows.

    Raises:
        DamagedError: As in ``check_weights``.
        UnsupportedError: Experts that the files hold in a form that is not known.
    """
    places, shared = _places(folder, shell), set(shell.all_tied_weights_keys or {})
    found: dict[str, tuple[Place, ...]] = {}
    for name in shell.state_dict():
        if name in places:
            found[name] = (places[name],)
        elif name not in shared:
            found[name] = _expert_parts(name, places)
    return found


def _expert_parts(name: str, places: dict[str, Place]) -> tuple[Place, ...]:
    """An expert's matrix in the parts and under the names that its family's files have."""
    path, _, module = name.removesuffix(".weight").rpartition(".")
    for names in _EXPERT_PARTS.get(module, ()):
        parts = [places.get(f"{path}.{part}.weight") for part in names]
        if None not in parts:
            return tuple(part for part in parts if part is not None)
    raise UnsupportedError(f"{name} must lie in a file of its own name, or in known parts; it does not; load the model as a whole")


def _places(folder: Path, shell: PreTrainedModel) -> dict[str, Place]:
    """Every tensor of the files, by the name that the model has for it."""
    old, new = _RENAMED.get(str(shell.config.model_type), ("", ""))
    found: dict[str, Place] = {}
    for place in (entry for path in weight_files(folder) for entry in _header(path)):
        if found.setdefault(place.key.replace(old, new, 1), place) is not place:
            raise DamagedError(f"{folder} must hold each weight once; {place.key} is there twice; fetch the model again")
    wanted, base = shell.state_dict(), f"{shell.base_model_prefix}."
    # files of a bare model, such as OPT's, have their names without it
    return {base + name if name not in wanted and base + name in wanted else name: place for name, place in found.items()}


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would load: one, or those that the index names.

    Raises:
        DamagedError: One is missing, or the index is no index.
        UnsupportedError: There are only pickles.
    """
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = {"model.safetensors"}
    elif index.is_file():
        try:
            files = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DamagedError(f"{index} must map weights to files; {first_line(error)}; fetch the model again") from error
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UnsupportedError(f"{folder} must hold safetensors; only pickle files are there and none is read; convert them first")
    else:
        raise DamagedError(f"{folder} must hold model.safetensors; there is none; fetch the model again")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(files):
        if name not in present:
            raise DamagedError(f"{folder} must hold its weight file {name!r}; it is missing or elsewhere; fetch the model again")
        if not _is_within(folder / name, folder):
            raise DamagedError(f"{folder} must hold its weight files; {name} is a link to elsewhere; give the folder where it lies")
    return [folder / name for name in sorted(files)]


def _is_within(path: Path, folder: Path) -> bool:
    """Whether a file lies where it seems to, or in the store of the hub's cache, whose folders are of links into it."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parents[1] / "blobs" if len(home.parents) > 1 and home.parent.name == "snapshots" else None
    return real.parent == home or (blobs is not None and real.parent == blobs.resolve())


@contextmanager
def readable(path: Path | str) -> Iterator[None]:
    """Says that a path must be readable when the system refuses something in the block."""
    try:
        yield
    except PPFError:
        raise
    except OSError as error:
        raise ResourceError(f"{path} must be readable; {error.strerror or error}; check its permissions") from error


def first_line(error: BaseException) -> str:
    """An error of any library in one short line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"


def _header(path: Path) -> Iterator[Place]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise DamagedError(f"{path} must be a whole safetensors file; its header is cut or too large; fetch it again")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
            places = [Place(path, name, list(entry["shape"]), str(entry["dtype"])) for name, entry in tensors.items()]
            others = {entry["dtype"] for entry in tensors.values()} - set(DTYPES)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise DamagedError(
                f"{path} must be a safetensors file; its header is bad: {first_line(error)}; fetch it again"
            ) from error
    if end != size - 8 - length:
        raise DamagedError(f"{path} must hold {end:,} bytes of weights; it holds {size - 8 - length:,}; fetch it again")
    if others:
        raise UnsupportedError(f"{path} must hold floating-point weights; {min(map(str, others))} came; use the original model")
    yield from places


def _fused(shell: PreTrainedModel) -> bool:
    """Whether the family's own code would fuse experts; an exported model has them in its files as they are in it."""
    return not str(shell.config.model_type).startswith("ppf_") and any(isinstance(module, Experts) for module in shell.modules())
