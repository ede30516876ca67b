"""A pruned model as a folder that loads anywhere, and the proof that it does, before the folder gets its name."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from ppf.artifact import atomic_folder, check_room, write_json
from ppf.errors import DamagedError, ResourceError
from ppf.llm import pruned_model
from ppf.llm.auto import register
from ppf.llm.weights import readable, weight_files

MODELING_FILE = "modeling_ppf.py"
PLAN_FILE = "ppf.json"
CHECKED = "reloaded and checked"
"""What ``verify`` does, in words."""
_ALIGNED = 64


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: dict[str, Any], out: Path, force: bool = False) -> int:
    """Writes safetensors, config, modeling file if it is pruned, tokenizer, generation config and ``ppf.json``.

    Args:
        model: What ``cut`` made, or a dense model.
        tokenizer: The dense model's.
        plan: JSON-ready record of the decision, for ``ppf.json``.
        out: The new folder; it appears only after its reload check passed.
        force: Replace an earlier export of that name.

    Returns:
        Bytes of the weight files.

    Raises:
        InputError: ``out`` exists, and is no earlier export or ``force`` is off.
        DamagedError: The reloaded model answers differently; nothing is left behind.
        ResourceError: The folder cannot be written.
    """
    check_room(out, sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()))
    with atomic_folder(out, force, PLAN_FILE) as folder:
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise ResourceError(f"{out} must be writable; {error}; free the disk or choose another place") from error
        write_beside(folder, model, tokenizer, plan)
        verify(model, folder)
        return weight_bytes(folder)


def write_beside(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, plan: dict[str, Any]) -> None:
    """Writes what lies beside config and weights; arguments as in ``export``."""
    tokenizer.save_pretrained(folder)
    if model.config.model_type.startswith("ppf_"):  # a dense model needs no code of ours
        (folder / MODELING_FILE).write_bytes(Path(pruned_model.__file__).read_bytes())
    write_json(folder / PLAN_FILE, plan)


def verify(model: PreTrainedModel, folder: Path) -> None:
    """Reloads a folder and compares its logits with the model in memory, bit for bit.

    Raises:
        DamagedError: They differ, or it does not load.
    """
    register()
    try:
        again = AutoModelForCausalLM.from_pretrained(
            folder, dtype=model.dtype, attn_implementation=model.config._attn_implementation, trust_remote_code=False
        )
        again.to(model.device).eval()
        for tensor in again.parameters():  # products of few rows, as experts have, round by where in memory a weight begins
            if tensor.data_ptr() % _ALIGNED:
                tensor.data = tensor.data.clone()
    except Exception as error:  # whatever the reader raises, the export is not good
        reason = " ".join(str(error).split())[:200]
        raise DamagedError(f"the exported folder must load; it does not: {reason}; nothing was written") from error
    ids = torch.arange(min(32, model.config.vocab_size), device=model.device)[None]
    with torch.inference_mode():
        ours, theirs = model(input_ids=ids).logits, again(input_ids=ids).logits
    difference = (ours - theirs).abs().max().item()
    if not difference == 0:
        raise DamagedError(
            f"the exported folder must answer as the model does; logits differ by {difference:g}; nothing was written"
        )


def weight_bytes(folder: Path) -> int:
    """Bytes of the safetensors files of a folder that a model is loaded from.

    Raises:
        DamagedError: There are none.
        ResourceError: The folder cannot be read.
    """
    with readable(folder):
        return sum(path.stat().st_size for path in weight_files(Path(folder)))
