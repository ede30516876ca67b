"""masked(): a dense model that computes as if some units were gone; nothing is copied or changed for good."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from ppf.llm.architectures import linear
from ppf.llm.compensation import Fill, means_per_site
from ppf.space.layout import Layout
from ppf.space.mask import Mask


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
        DamagedError: A fill of another model.
    """
    means = means_per_site(fill, layout)
    with ExitStack() as stack:
        for site, bits, mean in zip(layout.sites, mask.bits, means, strict=True):
            if bits.all():
                continue
            reader = linear(model, site.reader)
            columns = torch.from_numpy(bits.copy()).repeat_interleave(site.columns).to(reader.weight)
            hook = _multiply(columns) if mean is None else _replace(columns, mean.to(reader.weight) * (1 - columns))
            stack.callback(reader.register_forward_pre_hook(hook).remove)
        yield model


def _multiply(columns: torch.Tensor):
    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * columns, *inputs[1:])

    return hook


def _replace(columns: torch.Tensor, rest: torch.Tensor):
    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (torch.addcmul(rest, inputs[0], columns), *inputs[1:])

    return hook
