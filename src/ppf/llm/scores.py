"""Importance criteria: what each unit of each site is worth. One function each, one dict.

All read the units where they meet, at the input of the reader (o_proj, down_proj), and sum over its columns of one unit.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ppf.errors import InputError
from ppf.llm.architectures import linear, stack_of
from ppf.llm.head import in_parts, logits_of, states_of
from ppf.llm.placement import entry_of, weight_of
from ppf.space.importance import Importance
from ppf.space.layout import Layout, Site

Score = Callable[[PreTrainedModel, Layout, np.ndarray, int], list[torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Moment:
    """What one linear module reads of a text; float32, on the CPU.

    Attributes:
        mean: Float[C] of each input column over the tokens that reach the module; zeros where none does.
        square: Float[C], the mean square.
        share: Of all tokens, those that reach the module: 1, but for experts.
    """

    mean: torch.Tensor
    square: torch.Tensor
    share: float


Moments = dict[str, Moment]


def score_units(model: PreTrainedModel, layout: Layout, blocks: np.ndarray, method: str, source: str, seed: int) -> Importance:
    """Scores every unit of a model, which is not changed.

    Args:
        model: The dense model.
        layout: Its layout.
        blocks: Int[B, L] calibration tokens.
        method: One of ``SCORES``.
        source: Name of the calibration text, kept with the result.
        seed: Of ``random``.

    Raises:
        InputError: No such method.
    """
    if method not in SCORES:
        raise InputError(f"a score must be one of {', '.join(SCORES)}; {method!r} came; choose one")
    scores = SCORES[method](model, layout, blocks, seed)
    units = [per_unit(score, site) for score, site in zip(scores, layout.sites, strict=True)]
    return Importance(tuple(units), method, source)


def taylor(model: PreTrainedModel, layout: Layout, blocks: np.ndarray, seed: int) -> list[torch.Tensor]:
    """Squared first-order effect on the loss of scaling a column, summed over blocks (empirical Fisher of the mask).

    Gradients are taken for the masks alone; the weights need none. The loss is the sum over a block's tokens: the mean's
    gradients would vanish in float16. Of the layers only what enters each is kept; each runs once more on the way back, which
    saves the memory of what happens inside them. So does the head, for some tokens at a time.

    Reference: arXiv:1906.10771, method with gates (differs: gates on reader columns, one square a block).
    """
    totals = [torch.zeros(linear(model, site.reader).in_features) for site in layout.sites]
    with _frozen(model), _run_again(model), _gates(model, layout) as gates:
        for row in blocks:
            with torch.enable_grad():
                loss = _loss(model, row)
                grads = torch.autograd.grad(loss, gates, materialize_grads=True)  # an expert may see no token of a block
            for total, grad in zip(totals, grads, strict=True):
                total += grad.float().cpu() ** 2
    return totals


def _loss(model: PreTrainedModel, row: np.ndarray) -> torch.Tensor:
    """The cross-entropy of Int[L] token ids, summed."""
    targets = torch.from_numpy(np.ascontiguousarray(row[1:])).long()
    states = states_of(model, row[None])

    def of(part: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = logits_of(model, part)
        return functional.cross_entropy(logits, wanted.to(logits.device), reduction="sum")

    parts, loss = list(in_parts(model, states)), states.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(parts, targets.split([len(part) for part in parts]), strict=True):
        found = checkpoint(of, part, wanted, use_reentrant=False, preserve_rng_state=False)
        loss = loss + found.to(loss.device)  # a tied head lies with the embeddings, not where the last layer does
    return loss


def flap(model: PreTrainedModel, layout: Layout, blocks: np.ndarray, seed: int) -> list[torch.Tensor]:
    """Variance of a column's input times the squared norm of its weights.

    Reference: arXiv:2312.11983, section 3 (WIFV; differs: no standardisation across layers, since only the order
    inside a site is used).
    """
    seen = moments(model, [site.reader for site in layout.sites], blocks)
    return [fluctuation(model, site, seen) for site in layout.sites]


def wanda_sp(model: PreTrainedModel, layout: Layout, blocks: np.ndarray, seed: int) -> list[torch.Tensor]:
    """Mean size of a column's weights times the norm of its input.

    Reference: arXiv:2306.11695, section 3, in the structured form of arXiv:2312.11983.
    """
    seen = moments(model, [site.reader for site in layout.sites], blocks)
    norms = [(seen[site.reader].square * seen[site.reader].share).sqrt() for site in layout.sites]
    return [norm * _weights(model, site).abs().mean(0) for norm, site in zip(norms, layout.sites, strict=True)]


def magnitude(model: PreTrainedModel, layout: Layout, blocks: np.ndarray, seed: int) -> list[torch.Tensor]:
    """Norm of a column of the reader; needs no text."""
    return [_weights(model, site).norm(dim=0) for site in layout.sites]


def random(model: PreTrainedModel, layout: Layout, blocks: np.ndarray, seed: int) -> list[torch.Tensor]:
    """Seeded noise: the control."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(linear(model, site.reader).in_features, generator=generator) for site in layout.sites]


SCORES: dict[str, Score] = {"taylor": taylor, "flap": flap, "wanda_sp": wanda_sp, "magnitude": magnitude, "random": random}


def per_unit(columns: torch.Tensor, site: Site) -> np.ndarray:
    """Float[U]: what the reader's columns (Float[U * C]) of each unit sum up to."""
    return columns.reshape(site.units, site.columns).sum(1).numpy()


def fluctuation(model: PreTrainedModel, site: Site, seen: Moments) -> torch.Tensor:
    """Float[U * C]: FLAP's score of each column of a reader, from the moments of its inputs."""
    read = seen[site.reader]
    return read.share * (read.square - read.mean**2).clamp(min=0) * _weights(model, site).square().sum(0)


@torch.inference_mode()
def moments(model: PreTrainedModel, names: Iterable[str], blocks: np.ndarray) -> Moments:
    """What linear modules read of a text, in one pass through the model.

    Args:
        model: The dense model.
        names: Paths of the modules.
        blocks: Int[B, L] tokens.

    Returns:
        What each module read, by path.
    """
    modules = {name: linear(model, name) for name in names}
    sums = {name: [torch.zeros(module.in_features, dtype=torch.float64) for _ in range(2)] for name, module in modules.items()}
    tokens = dict.fromkeys(modules, 0)

    def hook(name: str, inputs: tuple[torch.Tensor, ...]) -> None:
        flat = exact(inputs[0].reshape(-1, inputs[0].shape[-1]))
        sums[name][0] += flat.sum(0).cpu()
        sums[name][1] += flat.square().sum(0).cpu()
        tokens[name] += len(flat)

    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(lambda _, inputs, name=name: hook(name, inputs))
            stack.callback(handle.remove)
        for row in blocks:
            ids = torch.from_numpy(np.ascontiguousarray(row)).to(entry_of(model), torch.long)
            model.base_model(input_ids=ids[None], use_cache=False)  # what follows is of no use, and large
    found = {}
    for name, (first, second) in sums.items():
        count = max(tokens[name], 1)
        found[name] = Moment((first / count).float(), (second / count).float(), tokens[name] / max(blocks.size, 1))
    return found


def exact(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in float64, or in float32 where its device knows no more (mps)."""
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def _weights(model: PreTrainedModel, site: Site) -> torch.Tensor:
    return weight_of(linear(model, site.reader)).float().cpu()


@contextmanager
def _frozen(model: PreTrainedModel) -> Iterator[None]:
    needed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)


@contextmanager
def _run_again(model: PreTrainedModel) -> Iterator[None]:
    """Keeps nothing of what happens inside a layer for its gradients. transformers' own way asks for training mode."""
    with ExitStack() as stack:
        for layer in stack_of(model):
            before = layer.__dict__.get("forward")  # another library may have put its own there
            stack.callback(delattr if before is None else setattr, layer, "forward", *(() if before is None else (before,)))
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        yield


@contextmanager
def _gates(model: PreTrainedModel, layout: Layout) -> Iterator[list[torch.Tensor]]:
    """A gate of ones before every reader column; only gates carry gradients."""
    gates = []
    with ExitStack() as stack:
        for site in layout.sites:
            reader = linear(model, site.reader)
            gate = torch.ones(reader.in_features, device=entry_of(reader), dtype=reader.weight.dtype, requires_grad=True)
            gates.append(gate)
            stack.callback(reader.register_forward_pre_hook(lambda _, inputs, gate=gate: (inputs[0] * gate,)).remove)
        yield gates
