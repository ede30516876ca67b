"""A dense model that computes as if some units were gone, as long as a block runs; it comes back as it was.

masked      zeros in their place: no weight is copied, and no work is saved
narrowed    the weights of the cut model: what stays is copied, and the work is that of the cut model; of a large model most
            layers are copied only while they run, at every batch, since a second model would not fit beside the first
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.llm.architectures import counters_of, linear, stack_of
from ppf.llm.compensation import Fill, means_per_site
from ppf.llm.depth import stand_ins
from ppf.llm.norms import as_cut, multiply, routed
from ppf.llm.perplexity import enough_memory
from ppf.llm.surgery import cut_site, slices_of
from ppf.space.layout import Layout, Site
from ppf.space.mask import Mask, check_mask

KEPT_BYTES = 2**28
"""Of copied weights that stay as long as a mask does."""
Cuts = list[tuple[Site, torch.Tensor]]
"""Sites with Bool[U], which units stay."""


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
def narrowed(model: PreTrainedModel, layout: Layout, mask: Mask, kept_bytes: int = KEPT_BYTES) -> Iterator[PreTrainedModel]:
    """Gives the modules of the dense model the weights of the cut one while the block runs.

    Args:
        model: The dense model.
        layout: Its layout.
        mask: Which units stay.
        kept_bytes: What copied weights may take for the whole of the block; layers beyond that have them only while they run.

    Yields:
        The same model. Its logits equal those under ``masked``, up to rounding; its config and its parameters are for
        running it only.

    Raises:
        InputError: As for ``masked``.
        ResourceError: The copy is too much for the memory.
    """
    check_mask(mask, layout)
    dense = model.state_dict()
    with ExitStack() as stack:
        stack.enter_context(routed(model, zip(layout.sites, map(int, mask.allocation.kept), strict=True)))
        for layer, cuts in _by_layer(layout, mask).items():
            kept_bytes -= model.dtype.itemsize * sum(site.cost * int(bits.sum()) for site, bits in cuts)
            if kept_bytes >= 0:
                with enough_memory():
                    _cut(stack, model, dense, cuts)
            else:
                _cut_while_it_runs(stack, model, dense, cuts, stack_of(model)[layer])
        for site, bits in zip(layout.sites, mask.bits, strict=True):
            if not bits.any():
                for owner, name, other in stand_ins(model, site):
                    _set(stack, owner, name, other)
                continue
            _count(stack, model, layout.model_type, site, int(bits.sum()))
        yield model


def _by_layer(layout: Layout, mask: Mask) -> dict[int, Cuts]:
    """The sites that lose some of their units and not all."""
    cuts: dict[int, Cuts] = {}
    for site, bits in zip(layout.sites, mask.bits, strict=True):
        if bits.any() and not bits.all():
            cuts.setdefault(site.layer, []).append((site, torch.from_numpy(bits.copy())))
    return cuts


def _cut(stack: ExitStack, model: PreTrainedModel, dense: dict[str, torch.Tensor], cuts: Cuts) -> None:
    """Gives modules what stays of their weights until the stack is closed."""
    state = {name: dense[name] for site, bits in cuts for name in slices_of(site, bits) if name in dense}
    for site, bits in cuts:
        cut_site(model, state, site, bits, None)
    for name, tensor in state.items():
        path, _, leaf = name.rpartition(".")
        _set(stack, model.get_submodule(path), leaf, nn.Parameter(tensor, requires_grad=False))


def _cut_while_it_runs(
    stack: ExitStack, model: PreTrainedModel, dense: dict[str, torch.Tensor], cuts: Cuts, layer: nn.Module
) -> None:
    """The same whenever the layer runs, and only then, until the stack is closed."""
    running = ExitStack()
    stack.callback(running.close)  # torch calls no hook when what stops a layer is no Exception, such as Ctrl-C
    stack.callback(layer.register_forward_pre_hook(lambda *_: _cut(running, model, dense, cuts)).remove)
    stack.callback(layer.register_forward_hook(lambda *_: running.close(), always_call=True).remove)


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
