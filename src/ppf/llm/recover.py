"""Recovery: a pruned model is trained to answer as the dense one does again, or on text alone where there is none.

Either every weight is trained, or low-rank adapters (LoRA, arXiv:2106.09685) beside every linear layer of the layout, which
are added to the weights at the end: the result is a plain model of the same shape.
"""

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from ppf.errors import InputError, ResourceError
from ppf.space.layout import Layout

WARM_UP = 0.05
"""Share of the steps over which the learning rate rises."""
CLIP = 1.0
"""Norm that the gradient of a step has at most."""
_BETAS = (0.9, 0.95)
_WIDTH_RATES = {"lora": 0.5, "full": 0.16}


@dataclass(frozen=True)
class Training:
    """How a model is trained.

    Attributes:
        rank: Of the adapters; None trains every weight.
        lr: The highest learning rate, reached after the warm-up; from there it falls to 0 along a cosine.
        steps: Updates of the weights.
        sequences: Blocks of text for one update.
        at_once: Blocks that go through the model at once.
        dtype: Precision of the computation; trained weights and their updates are float32 in any case.
        seed: Of the order of the blocks and of the adapters.
    """

    rank: int | None
    lr: float
    steps: int
    sequences: int
    at_once: int
    dtype: torch.dtype
    seed: int

    def scale(self, step: int) -> float:
        """Learning rate at a step, as a share of the highest."""
        warm = max(1, math.ceil(WARM_UP * self.steps))
        return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def usual_lr(hidden_size: int, rank: int | None) -> float:
    """A learning rate for a model of some width, by which Adam's is divided when widths grow.

    Reference: arXiv:2203.03466, table 3, for matrices of hidden layers. The factors are our own, from ref-a.
    """
    return _WIDTH_RATES["full" if rank is None else "lora"] / hidden_size


def check_adapters() -> None:
    """Refuses adapters at once where their package is missing.

    Raises:
        ResourceError: It is.
    """
    _peft()


def recover(
    model: PreTrainedModel,
    layout: Layout,
    blocks: np.ndarray,
    teacher: PreTrainedModel | None,
    how: Training,
    advance: Callable[..., None],
) -> PreTrainedModel:
    """Trains a model in place.

    Args:
        model: In float32, or for adapters in any dtype, on the device to train on.
        layout: Its layout.
        blocks: Int[B, L] tokens to train on.
        teacher: The dense model on the same device, which stays as it is; None learns to predict the text.
        how: Learning rate, steps, and so on.
        advance: Called once a step, with the loss of that step in words.

    Returns:
        The same model, adapters merged, in evaluation mode.

    Raises:
        InputError: The loss is no longer finite.
        ResourceError: Adapters are wanted, and their package is missing.
    """
    model.requires_grad_(how.rank is None).eval()  # no dropout: the aim is the teacher's answer, and the seed is the only chance
    if how.rank is None:
        _train(model, blocks, teacher, how, advance)
        return model.requires_grad_(False)
    adapters = adapted(model, layout, how.rank, how.seed)
    _train(model, blocks, teacher, how, advance)
    return adapters.merge_and_unload()


def adapted(model: PreTrainedModel, layout: Layout, rank: int, seed: int) -> Any:
    """PEFT's LoRA in every linear layer that a layout names; ``merge_and_unload`` makes a plain model of it again.

    Until it learns, the model answers as before.
    """
    peft = _peft()
    modules = {rows.module for site in layout.sites for rows in site.writers} | {site.reader for site in layout.sites}
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=sorted(modules))
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT about transformers
        torch.manual_seed(seed)
        adapters = peft.LoraModel(model, config, "default")
    for parameter in adapters.parameters():
        if parameter.requires_grad:  # PEFT makes them in the dtype of the weights, where small updates would be lost
            parameter.data = parameter.data.float()
    return adapters


def batches(count: int, how: Training) -> Iterator[np.ndarray]:
    """Int[sequences] for each step: which blocks it reads. Every block comes once before one comes again, in a new order."""
    rng = np.random.default_rng(how.seed)
    waiting: np.ndarray = np.zeros(0, dtype=np.int64)
    for _ in range(how.steps):
        while len(waiting) < how.sequences:
            waiting = np.concatenate([waiting, rng.permutation(count)])
        taken, waiting = np.split(waiting, [how.sequences])
        yield taken


def _train(model: PreTrainedModel, blocks: np.ndarray, teacher: PreTrainedModel | None, how: Training, advance: Any) -> None:
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=how.lr, betas=_BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, how.scale)
    for step, rows in enumerate(batches(len(blocks), how)):
        loss = _backward(model, blocks[rows], teacher, how)
        norm = torch.nn.utils.clip_grad_norm_(weights, CLIP).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            came = f"loss {loss:g} with a gradient of {norm:g} came at step {step + 1} of {how.steps}"
            raise InputError(f"loss and gradient must stay finite; {came}; lower --lr or take --dtype float32")
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        advance(f"loss {loss:.4f}")


def _backward(model: PreTrainedModel, blocks: np.ndarray, teacher: PreTrainedModel | None, how: Training) -> float:
    """Adds the gradient of the mean loss of some blocks, nats/token, which it returns."""
    total = 0.0
    for start in range(0, len(blocks), how.at_once):
        part = np.ascontiguousarray(blocks[start : start + how.at_once])
        ids = torch.from_numpy(part).to(model.device, torch.long)
        with torch.autocast(model.device.type, how.dtype, enabled=how.dtype != torch.float32):
            answers = None if teacher is None else _logits(teacher, ids)
            loss = _loss(model(input_ids=ids, use_cache=False).logits[:, :-1].float(), answers, ids) * (len(part) / len(blocks))
        loss.backward()
        total += loss.item()
    return total


def _loss(logits: torch.Tensor, answers: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
    """KL divergence from a teacher's logits, else cross-entropy with the text; the mean over tokens, nats.

    Args:
        logits: Float[B, L - 1, V] of the model.
        answers: The teacher's, alike.
        ids: Int[B, L], the text.
    """
    if answers is None:
        return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    ours, theirs = (values.log_softmax(-1).flatten(0, 1) for values in (logits, answers))
    return functional.kl_div(ours, theirs, reduction="batchmean", log_target=True)


@torch.no_grad()
def _logits(teacher: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return teacher(input_ids=ids, use_cache=False).logits[:, :-1].float()


def _peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ResourceError("LoRA adapters need PEFT; it is missing; pip install 'ppf[recover]', or take --full") from error
