"""From a name to a model: the embedded one, a local folder, or a hub id. Only safetensors is read; no remote code is run."""

import copy
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from ppf.artifact import MAX_HEADER
from ppf.errors import DamagedError, InputError, PPFError, ResourceError, UnsupportedError
from ppf.llm.architectures import family_of, layout_of_model, skeleton
from ppf.llm.auto import register
from ppf.llm.experts import separate_experts
from ppf.llm.hub import fetch
from ppf.llm.placement import Placement, convert, copied, free_weights, take_weights
from ppf.llm.stored import stored
from ppf.llm.weights import check_weights, first_line, readable
from ppf.space.layout import Layout

EMBEDDED = {"ref-a": Path(__file__).parent.parent / "models" / "ref-a"}
_MAX_LAYERS = 1000
_SAMPLE = 4096
_INCIDENTAL = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "auto_map"}


def quiet_transformers() -> None:
    """Silences transformers' log and progress bars in this whole process: for programs, never for a library's caller."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model with all that is known of it.

    Attributes:
        model: In evaluation mode, in the dtype of its checkpoint.
        tokenizer: Its tokenizer, checked to fit its vocabulary.
        layout: Its removable places.
        name: As the user called it; empty for an object that came from nowhere.
        folder: Where its files lie; None if it was given as an object.
        digest: See ``model_digest``.
        dtype: Of the checkpoint, whatever the model was converted to since.
        spread: Its copy that lies on several devices, if there is one: ``on`` keeps the last, and two would not fit.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    name: str
    folder: Path | None
    digest: str
    dtype: torch.dtype
    spread: dict[tuple[Placement, torch.dtype], PreTrainedModel] = field(default_factory=dict)

    def on(self, where: Placement, dtype: torch.dtype) -> PreTrainedModel:
        """The model there in a dtype: itself where nothing is lost by converting it, else a copy.

        A model that the caller gave as an object is never changed, nor is one that is spread: its copy has its weights.
        """
        if where.limits is not None:
            if (where, dtype) not in self.spread:
                self.spread.clear()
                self.spread[where, dtype] = copied(self.model, where, dtype)
            return self.spread[where, dtype]
        if self.model.device == where.device and self.model.dtype == dtype:
            return self.model
        if self.folder is None or torch.promote_types(self.dtype, dtype) != dtype:
            return copied(self.model, where, dtype)
        return convert(self.model, where.device, dtype)

    def rest(self) -> None:
        """Exchanges weights that were converted for those of the files, which are mapped and take no memory of their own.

        Those of experts that files hold one by one are copied, in the dtype of the files.

        Raises:
            DamagedError: The files are not those that were loaded.
        """
        if self.folder is None or self.model.dtype == self.dtype:
            return
        try:
            opened = open_checkpoint(str(self.folder))
            digest = stored_digest(opened)
        except PPFError:  # files that are gone: it stays as it is
            return
        if digest != self.digest:
            raise DamagedError(f"{self.folder} must stay as it was while it is used; its files changed; start again")
        free_weights(self.model)  # first: copies would have no room beside them
        take_weights(self.model, _read_weights(opened.folder, opened.config))


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model whose weights stay in their files.

    Attributes:
        config: As its folder has it.
        shell: The model on the meta device: shapes, no weight.
        tokenizer: As in ``LoadedModel``; so are ``layout``, ``name`` and ``folder``.
    """

    config: Any
    shell: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: Layout
    name: str
    folder: Path


def open_checkpoint(name: str) -> Checkpoint:
    """All that is known of a model without reading its weights; their files' headers are checked. Arguments as in ``load_model``.

    Raises:
        InputError: As in ``load_model``, and so are the others.
    """
    folder = resolve(name)
    with readable(folder):
        config = read_config(folder)
        shell = skeleton(config)
        check_weights(folder, shell)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    return Checkpoint(config, shell, tokenizer, layout_of_model(shell), name, folder)


def load_model(name: str) -> LoadedModel:
    """Loads a causal LM on the CPU in the dtype of its checkpoint.

    Args:
        name: ``ref-a`` (embedded), a folder, or a hub id.

    Raises:
        InputError: No such folder or hub id, or a tokenizer that does not fit.
        UnsupportedError: A family that ppf does not know; found before weights are read.
        DamagedError: A weight is missing, extra, cut or of another shape than the config says.
        ResourceError: The hub cannot be reached, or a file cannot be read.
    """
    opened = open_checkpoint(name)
    model = _read_weights(opened.folder, opened.config).eval()
    return LoadedModel(model, opened.tokenizer, opened.layout, name, opened.folder, model_digest(model), model.dtype)


def adopt_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> LoadedModel:
    """Takes a model that the caller already has.

    Its modules are copied and its weights are shared, so that neither evaluation mode nor hooks reach the caller's.

    Raises:
        InputError: No tokenizer is given and none lies where the model came from.
        UnsupportedError: A family that ppf does not know, or not a causal LM.
    """
    if model.get_output_embeddings() is None:
        raise UnsupportedError(f"a model must be a causal LM; {type(model).__name__} has no language-model head; pass one that has")
    name = str(getattr(model.config, "_name_or_path", ""))
    if tokenizer is None:
        with readable(name):
            found = name and Path(name).is_dir()
        if not found:
            raise InputError("a model given as an object needs its tokenizer; none came; pass tokenizer=...")
        tokenizer = load_tokenizer(Path(name), model.config.vocab_size)
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = separate_experts(copy.deepcopy(model, weights).eval())
    return LoadedModel(twin, tokenizer, layout_of_model(twin), name, None, model_digest(twin), twin.dtype)


def resolve(name: str) -> Path:
    """The folder that holds a model's files, fetched from the hub if need be.

    Raises:
        InputError: Neither a folder nor a hub id.
        DamagedError: What was fetched is not what the hub has.
        UnsupportedError: A model on the hub of a family that ppf does not know; found before its weights are fetched.
        ResourceError: The hub cannot be reached, or the folder cannot be looked at.
    """
    if name in EMBEDDED:
        return EMBEDDED[name]
    try:
        path = Path(name).expanduser()
        if path.is_dir():
            return path.resolve()
        local = path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1
    except PermissionError as error:
        raise ResourceError(f"{name} must be readable; {error.strerror}; check its permissions") from error
    except (OSError, RuntimeError):  # too long a name, no such home
        local = True
    if local:
        raise InputError(f"a model must be a folder, a hub id or ref-a; {name!r} is none; check the spelling")
    try:
        return fetch(name, read_config)
    except PPFError:
        raise
    except Exception as error:  # the hub's HTTP layer raises what it will
        if isinstance(error, (HFValidationError, RepositoryNotFoundError)) and not isinstance(error, GatedRepoError):
            raise InputError(f"a model must be a folder, a hub id or ref-a; {name!r} is none; check the spelling") from error
        message = f"{name!r} is no folder, so the hub must have it; that failed: {first_line(error)}; go online or give a folder"
        raise ResourceError(message) from error


def read_config(folder: Path) -> Any:
    """The config of a known family; code that a folder may bring is never run.

    Raises:
        InputError: No config.json.
        DamagedError: One that is not valid.
        UnsupportedError: Another family, quantised weights, or an adapter alone.
    """
    path = folder / "config.json"
    if not path.is_file() and (folder / "adapter_config.json").is_file():
        raise UnsupportedError(
            f"a model must be a whole one; {folder} holds an adapter alone; merge it into its model and save that"
        )
    if not path.is_file():
        raise InputError(f"a model folder must hold config.json; {folder} does not; give the folder of a Hugging Face model")
    try:
        if path.stat().st_size > MAX_HEADER:
            raise ValueError(f"more than {MAX_HEADER:,} bytes")
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
        kind, layers = raw["model_type"], raw.get("num_hidden_layers")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedError(f"{path} must be a model's JSON config; {first_line(error)}; restore it") from error
    family_of(_Named(str(kind)))
    if raw.get("quantization_config") is not None:
        raise UnsupportedError(f"{folder} must hold unquantised weights; its config is of quantised ones; use the original model")
    if isinstance(layers, int) and layers > _MAX_LAYERS:  # even their shapes would fill the memory
        raise DamagedError(f"{path} must have at most {_MAX_LAYERS} layers; it has {layers}; restore it")
    register()
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the errors of a config's many checks share no base
        raise DamagedError(f"{path} must be a valid {kind} config; {first_line(error)}; restore it") from error


def _finite(text: str) -> float:
    """A number of JSON; no model has an infinite one, or NaN."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no finite number")
    return value


def load_tokenizer(folder: Path, vocab_size: int) -> PreTrainedTokenizerBase:
    """The tokenizer beside a model.

    Raises:
        InputError: None is there, or its ids do not fit the vocabulary.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare Exception for a damaged file
        raise InputError(f"{folder} must hold a tokenizer; {first_line(error)}; put its tokenizer.json there") from error
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise InputError(
            f"the tokenizer must fit the model's {vocab_size} embeddings; its highest id is {highest}; use its own tokenizer"
        )
    return tokenizer


def _read_weights(folder: Path, config: Any) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype="auto", use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # what the readers of damaged files raise shares no base
        raise DamagedError(f"{folder} must load; it does not: {first_line(error)}; fetch the model again") from error
    if report["missing_keys"]:
        raise DamagedError(f"{folder} must hold the weight {min(report['missing_keys'])}; it is missing; fetch the model again")
    return separate_experts(model)


def model_digest(model: PreTrainedModel) -> str:
    """Hash of what a model computes with: see ``digest_of``."""
    return digest_of(model.config, sorted(model.named_parameters()))


def digest_of(config: Any, tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash of a config, and of every tensor the name, the shape and samples.

    Of the config only what differs from its family's defaults counts, so that a new field of a later transformers changes
    nothing. Of a tensor the first, the last and evenly spread values count, 4,096 of each, as float32.

    Args:
        config: Of the model.
        tensors: Its parameters with their names, in the order of these, each once.
    """
    defaults = type(config)().to_dict()
    own = {name: value for name, value in config.to_dict().items() if name not in defaults or value != defaults[name]}
    fields = {name: value for name, value in own.items() if name not in _INCIDENTAL} | {"model_type": config.model_type}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, tensor in tensors:
        flat = tensor.detach().reshape(-1)
        some = torch.cat([flat[:_SAMPLE], flat[-_SAMPLE:], flat[:: max(1, flat.numel() // _SAMPLE)]]).float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:32]


def stored_digest(source: Checkpoint) -> str:
    """``model_digest`` of the model that would be loaded.

    Raises:
        UnsupportedError: Experts that the files hold in a form that is not known.
    """
    weights = stored(source.folder, source.shell)
    names = sorted(name for name, _ in source.shell.named_parameters())
    return digest_of(source.shell.config, ((name, weights[name]) for name in names))


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of how a tokenizer splits text, whatever it was asked to pad or to cut."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    record = json.loads(backend.to_str()) if backend else tokenizer.get_vocab()
    how = {name: value for name, value in record.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class _Named:
    model_type: str
