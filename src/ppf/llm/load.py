"""From a name to a model: the embedded one, a local folder, or a hub id. Only safetensors is read; no remote code is run."""

import copy
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from ppf.errors import DamagedError, InputError, ResourceError, UnsupportedError
from ppf.llm.architectures import family_of, layout_of_model, skeleton
from ppf.llm.auto import register
from ppf.space.layout import Layout

EMBEDDED = {"ref-a": Path(__file__).parent.parent / "models" / "ref-a"}
_MAX_HEADER = 16 * 2**20
_MAX_LAYERS = 1000
_FLOATS = {"F64", "F32", "F16", "BF16"}
_SAMPLE = 4096
_INCIDENTAL = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "auto_map"}

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with all that is known of it.

    Attributes:
        model: In evaluation mode, in the dtype of its checkpoint.
        tokenizer: Its tokenizer, checked to fit its vocabulary.
        layout: Its removable places.
        name: As the user called it.
        folder: Where its files lie; None if it was given as an object.
        digest: See ``model_digest``.
        dtype: Of the checkpoint, whatever the model was converted to since.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    name: str
    folder: Path | None
    digest: str
    dtype: torch.dtype

    def on(self, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
        """The model on a device in a dtype: itself where nothing is lost by converting it, else a copy.

        A model that the caller gave as an object is never changed.
        """
        same = self.model.device == device and self.model.dtype == dtype
        lossless = torch.promote_types(self.dtype, dtype) == dtype
        if same:
            return self.model
        return convert(self.model if self.folder is not None and lossless else copy.deepcopy(self.model), device, dtype)


def load_model(name: str) -> LoadedModel:
    """Loads a causal LM on the CPU in the dtype of its checkpoint.

    Args:
        name: ``ref-a`` (embedded), a folder, or a hub id.

    Raises:
        InputError: No such folder or hub id, or a tokenizer that does not fit.
        UnsupportedError: A family that ppf does not know; found before weights are read.
        DamagedError: A weight is missing, extra, cut or of another shape than the config says.
        ResourceError: The hub cannot be reached.
    """
    folder = resolve(name)
    config = read_config(folder)
    shell = skeleton(config)
    check_weights(folder, shell)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    model = _read_weights(folder, config)
    return LoadedModel(model.eval(), tokenizer, layout_of_model(shell), name, folder, model_digest(model), model.dtype)


def adopt_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> LoadedModel:
    """Takes a model that the caller already has; it is put into evaluation mode and not changed otherwise.

    Raises:
        InputError: No tokenizer is given and none lies where the model came from.
        UnsupportedError: A family that ppf does not know, or not a causal LM.
    """
    if model.get_output_embeddings() is None:
        raise UnsupportedError(f"a model must be a causal LM; {type(model).__name__} has no language-model head; pass one that has")
    layout = layout_of_model(model)
    name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
    if tokenizer is None:
        if not Path(name).is_dir():
            raise InputError("a model given as an object needs its tokenizer; none came; pass tokenizer=...")
        tokenizer = load_tokenizer(Path(name), model.config.vocab_size)
    return LoadedModel(model.eval(), tokenizer, layout, name, None, model_digest(model), model.dtype)


def convert(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Moves a model and converts its weights, in place.

    Unlike ``model.to(dtype)`` it leaves the rotary frequencies as exact as transformers loads them; in bfloat16 they
    would turn far positions by wrong angles.
    """
    exact = {name: buffer.to(device) for name, buffer in model.named_buffers()}
    model.to(device, dtype)
    for name, buffer in exact.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, buffer)
    return model


def resolve(name: str) -> Path:
    """The folder that holds a model's files, fetched from the hub if need be.

    Raises:
        InputError: Neither a folder nor a hub id.
        ResourceError: The hub cannot be reached.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path.resolve()
        local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    except (OSError, RuntimeError):  # too long a name, no such home
        local = True
    if local:
        raise InputError(f"a model must be a folder, a hub id or ref-a; {name!r} is none; check the spelling")
    try:
        patterns = ["*.json", "*.safetensors", "tokenizer.model", "*.jinja"]
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's HTTP layer raises what it will
        if isinstance(error, (HFValidationError, RepositoryNotFoundError)) and not isinstance(error, GatedRepoError):
            raise InputError(f"a model must be a folder, a hub id or ref-a; {name!r} is none; check the spelling") from error
        message = f"{name} must be fetched from the hub; that failed: {_first_line(error)}; go online or give a folder"
        raise ResourceError(message) from error


def read_config(folder: Path) -> Any:
    """The config of a known family; code that a folder may bring is never run.

    Raises:
        InputError: No config.json.
        DamagedError: One that is not valid.
        UnsupportedError: Another family, or quantised weights.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"a model folder must hold config.json; {folder} does not; give the folder of a Hugging Face model")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind, layers = raw["model_type"], raw.get("num_hidden_layers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} must be a model's JSON config; {_first_line(error)}; restore it") from error
    family_of(_Named(str(kind)))
    if raw.get("quantization_config") is not None:
        raise UnsupportedError(f"{folder} must hold unquantised weights; its config is of quantised ones; use the original model")
    if isinstance(layers, int) and layers > _MAX_LAYERS:  # even their shapes would fill the memory
        raise DamagedError(f"{path} must have at most {_MAX_LAYERS} layers; it has {layers}; restore it")
    register()
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the errors of a config's many checks share no base
        raise DamagedError(f"{path} must be a valid {kind} config; {_first_line(error)}; restore it") from error


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        InputError: None is there, or its ids do not fit the vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise InputError(f"{folder} must hold a tokenizer; {_first_line(error)}; put its tokenizer.json there") from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise InputError(
            f"the tokenizer must fit the model's {vocab_size} embeddings; its highest id is {highest}; use its own tokenizer"
        )
    return tokenizer


def check_weights(folder: Path, shell: PreTrainedModel) -> None:
    """Compares the headers of the weight files with the shapes that the config asks for, before anything is loaded.

    Raises:
        DamagedError: A tensor is missing, extra or of another shape, a file is cut, or only pickles are there.
    """
    found = dict(_tensors(folder))
    wanted = {name: list(tensor.shape) for name, tensor in shell.state_dict().items()}
    shared = set(shell.all_tied_weights_keys or {})
    for name, shape in wanted.items():
        if name not in found and name not in shared:
            raise DamagedError(f"{folder} must hold the weight {name}; it is missing; fetch the model again")
        if name in found and found[name] != shape:
            raise DamagedError(f"{name} must have shape {shape} as config.json says; it has {found[name]}; fetch the model again")
    extra = sorted(name for name in set(found) - set(wanted) if not name.endswith("rotary_emb.inv_freq"))
    if extra:
        raise DamagedError(f"{folder} must hold only weights of its config; {extra[0]} is extra; is config.json its own?")


def _read_weights(folder: Path, config: Any) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # what the readers of damaged files raise shares no base
        raise DamagedError(f"{folder} must load; it does not: {_first_line(error)}; fetch the model again") from error
    if report["missing_keys"]:
        raise DamagedError(f"{folder} must hold the weight {min(report['missing_keys'])}; it is missing; fetch the model again")
    return model


def model_digest(model: PreTrainedModel) -> str:
    """Hash of what a model computes with: its config, and of every tensor the name, the shape and samples.

    Of a tensor the first, the last and evenly spread values count, 4,096 of each, as float32.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name not in _INCIDENTAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.named_parameters()):
        flat = tensor.detach().reshape(-1)
        some = torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:], flat[:: max(1, flat.numel() // _SAMPLE)]]).float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:32]


@dataclass(frozen=True)
class _Named:
    model_type: str


def _tensors(folder: Path) -> Iterator[tuple[str, list[int]]]:
    """Name and shape of every tensor, read from the headers of the safetensors files that transformers would load."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = {"model.safetensors"}
    elif index.is_file():
        try:
            files = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise DamagedError(f"{index} must map weights to files; {_first_line(error)}; fetch the model again") from error
    elif any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UnsupportedError(f"{folder} must hold safetensors; only pickle files are there and none is read; convert them first")
    else:
        raise DamagedError(f"{folder} must hold model.safetensors; there is none; fetch the model again")
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(files):
        if name not in present:
            raise DamagedError(f"{folder} must hold its weight file {name!r}; it is missing or elsewhere; fetch the model again")
        yield from _header(folder / name)


def _header(path: Path) -> Iterator[tuple[str, list[int]]]:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(_MAX_HEADER, size - 8):
            raise DamagedError(f"{path} must be a whole safetensors file; its header is cut or too large; fetch it again")
        try:
            header = json.loads(file.read(length))
            tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
            end = max((int(entry["data_offsets"][1]) for entry in tensors.values()), default=0)
            shapes = [(name, list(entry["shape"])) for name, entry in tensors.items()]
            others = {entry["dtype"] for entry in tensors.values()} - _FLOATS
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise DamagedError(
                f"{path} must be a safetensors file; its header is bad: {_first_line(error)}; fetch it again"
            ) from error
    if end != size - 8 - length:
        raise DamagedError(f"{path} must hold {end:,} bytes of weights; it holds {size - 8 - length:,}; fetch it again")
    if others:
        raise UnsupportedError(f"{path} must hold floating-point weights; {min(map(str, others))} came; use the original model")
    yield from shapes


def _first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
