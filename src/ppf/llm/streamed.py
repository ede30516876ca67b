"""export_streamed(): a dense folder to a pruned one, tensor by tensor; neither model is ever in memory.

dense files ── one tensor ──► slices_of its site ──► files of the smaller model ──► checked against the dense files
"""

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from ppf.artifact import atomic_folder, check_room
from ppf.errors import DamagedError
from ppf.llm.architectures import skeleton
from ppf.llm.export import PLAN_FILE, weight_bytes, write_beside
from ppf.llm.load import Checkpoint, read_config
from ppf.llm.masking import masked
from ppf.llm.stored import Stored, running_stored, stored, write_stored
from ppf.llm.surgery import Origins, slices_of, smaller_skeleton
from ppf.llm.weights import check_weights
from ppf.space.mask import Mask

BOUND = 1e-3
"""Root mean square difference of the last hidden states in float32 from the masked dense model's, as a share of these."""
CHECKED = "every tensor read back and compared with the dense files, and run layer by layer beside the masked dense model"
_TOKENS = 32


def export_streamed(source: Checkpoint, mask: Mask, plan: dict[str, Any], out: Path, force: bool = False) -> int:
    """Cuts a model from its files into a new folder, the same to the byte as ``export`` of ``cut``.

    It holds the largest tensor and its cut, whatever the size of the model.

    Args:
        source: The dense model.
        mask: Which units stay.
        plan: As in ``export``; so are ``out`` and ``force``.
        out: The new folder; it appears only after its check passed.
        force: Replace an earlier export of that name.

    Returns:
        Bytes of the weight files.

    Raises:
        InputError: ``out`` exists, and is no earlier export or ``force`` is off.
        UnsupportedError: Experts that the files hold in a form that is not known.
        DamagedError: What was written differs from what it should be; nothing is left behind.
        ResourceError: The folder cannot be written.
    """
    dense = stored(source.folder, source.shell)
    shell = copy.copy(source.shell)
    if (source.folder / "generation_config.json").is_file():
        shell.generation_config = GenerationConfig.from_pretrained(source.folder)
    smaller = smaller_skeleton(shell, source.layout, mask.allocation, dense.dtype)
    smaller.config.dtype = dense.dtype
    check_room(out, sum(parameter.numel() * parameter.element_size() for parameter in smaller.parameters()))
    cuts = _Cuts(source, dense, mask)
    with atomic_folder(out, force, PLAN_FILE) as folder:
        smaller.config.save_pretrained(folder)
        smaller.generation_config.save_pretrained(folder)
        names = write_stored(folder, smaller, cuts.tensor)
        write_beside(folder, smaller, source.tokenizer, plan)
        _check_tensors(folder, names, cuts)
        _check_answers(folder, source, dense, mask)
        return weight_bytes(folder)


class _Cuts:
    """The tensors of the smaller model, each cut when it is asked for."""

    def __init__(self, source: Checkpoint, dense: Stored, mask: Mask) -> None:
        self._dense, self._origins = dense, Origins(source.layout, mask.allocation)
        self._slices = {name: (0, ids) for name, ids in self._origins.rows.items()}
        for site, bits in zip(source.layout.sites, mask.bits, strict=True):
            self._slices |= slices_of(site, torch.from_numpy(bits.copy()))

    def tensor(self, name: str) -> torch.Tensor:
        """By its name in the smaller model."""
        origin = self._origins.of(name)
        whole = self._dense[origin]
        return whole.index_select(*self._slices[origin]) if origin in self._slices else whole


def _written(folder: Path) -> tuple[PreTrainedModel, Stored]:
    """The skeleton that the new folder's config describes, and its weights, which fit it."""
    shell = skeleton(read_config(folder))
    check_weights(folder, shell)
    return shell, stored(folder, shell)


def _check_tensors(folder: Path, names: list[str], cuts: _Cuts) -> None:
    """Reads every tensor back; a NaN, which equals nothing, is refused too."""
    found = _written(folder)[1]
    for name in names:
        if not torch.equal(found[name], cuts.tensor(name)):
            raise DamagedError(f"every tensor must be written as it was cut; {name} differs or is not finite; nothing was written")


@torch.inference_mode()
def _check_answers(folder: Path, source: Checkpoint, dense: Stored, mask: Mask) -> None:
    """Runs both models, module by module, up to the language-model head, which is one tensor of both."""
    ids = torch.arange(min(_TOKENS, source.config.vocab_size))[None]
    whole, (shell, weights) = copy.deepcopy(source.shell), _written(folder)
    with running_stored(shell, weights.__getitem__):
        ours = shell.base_model(input_ids=ids, use_cache=False).last_hidden_state
    with running_stored(whole, dense.__getitem__), masked(whole, source.layout, mask):
        theirs = whole.base_model(input_ids=ids, use_cache=False).last_hidden_state
    difference = float((ours - theirs).norm() / theirs.norm())
    if not difference <= BOUND:
        raise DamagedError(
            f"the exported folder must answer as the masked model does; hidden states differ by {difference:g}; nothing was written"
        )
