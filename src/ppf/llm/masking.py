"""A dense model that computes as if some units were gone, as long as a block runs; it comes back as it was.

masked      zeros in their place: no weight is copied, and no work is saved
narrowed    the weights of the cut model: what stays is copied, and the work is that of the cut model
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.llm.architectures import counters_of, linear
from ppf.llm.compensation import Fill, means_per_site
from ppf.llm.depth import stand_ins
from ppf.llm.norms import as_cut, multiply, routed
from ppf.llm.perplexity import enough_memory
from ppf.llm.surgery import cut_site
from ppf.space.layout import Layout, Site
from ppf.space.mask import Mask, check_mask


@contextmanager
def masked(model: PreTrainedModel, layout: Layout, mask: Mask, fill: Fill | None = None) -> Iterator[PreTrainedModel]:
    """Replaces what removed units feed into their readers while the block runs.

    Args:
        model: The dense model.
        layout: Its layout.
        mask: Which units stay.
        fill: What replaces it; None for zero.

    Yields:
        The same model. Its logits equal those of the model cut with the same fill, up to rounding.

    Raises:
        InputError: A mask of another model, or one that leaves a site less than it needs.
        DamagedError: A fill of another model.
    """
    check_mask(mask, layout)
    means = means_per_site(fill, layout)
    with ExitStack() as stack:
        stack.enter_context(as_cut(model, zip(layout.sites, mask.bits, strict=True)))
        for site, bits, mean in zip(layout.sites, mask.bits, means, strict=True):
            if bits.all() or not bits.any():
                continue
            reader = linear(model, site.reader)
            columns = torch.from_numpy(bits.copy()).repeat_interleave(site.columns).to(reader.weight.dtype)
            hook = multiply(columns) if mean is None else _replace(columns, mean.to(columns) * (1 - columns))
            stack.callback(reader.register_forward_pre_hook(hook).remove)
        yield model


@contextmanager
def narrowed(model: PreTrainedModel, layout: Layout, mask: Mask) -> Iterator[PreTrainedModel]:
    """Gives the modules of the dense model the weights of the cut one while the block runs.

    Args:
        model: The dense model.
        layout: Its layout.
        mask: Which units stay.

    Yields:
        The same model. Its logits equal those under ``masked``, up to rounding; its config and its parameters are for
        running it only.

    Raises:
        InputError: As for ``masked``.
        ResourceError: The copy is too much for the memory.
    """
    check_mask(mask, layout)
    dense = model.state_dict()
    state = dict(dense)
    with enough_memory():
        for site, bits in zip(layout.sites, mask.bits, strict=True):
            if bits.any() and not bits.all():
                cut_site(model, state, site, torch.from_numpy(bits.copy()), None)
    with ExitStack() as stack:
        stack.enter_context(routed(model, zip(layout.sites, map(int, mask.allocation.kept), strict=True)))
        for name, tensor in state.items():
            if tensor is not dense[name]:
                path, _, leaf = name.rpartition(".")
                _set(stack, model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))
        for site, bits in zip(layout.sites, mask.bits, strict=True):
            if not bits.any():
                for owner, name, other in stand_ins(model, site):
                    _set(stack, owner, name, other)
                continue
            _count(stack, model, layout.model_type, site, int(bits.sum()))
        yield model


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Sets an attribute until the stack is closed."""
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _count(stack: ExitStack, model: PreTrainedModel, family: str, site: Site, kept: int) -> None:
    """Tells a module how many heads it has now; its config, which others share, is copied for that."""
    for owner, holder, name, per_unit in counters_of(model, family, site):
        if holder:
            _set(stack, owner, holder, copy.copy(getattr(owner, holder)))
        _set(stack, getattr(owner, holder) if holder else owner, name, per_unit * kept)


def _replace(columns: torch.Tensor, rest: torch.Tensor):
    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal columns, rest
        columns, rest = columns.to(inputs[0].device), rest.to(inputs[0].device)
        return (torch.addcmul(rest, inputs[0], columns), *inputs[1:])

    return hook
