"""masked(): a dense model that computes as if some units were gone; nothing is copied or changed for good."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from transformers import PreTrainedModel

from ppf.llm.architectures import linear
from ppf.space.layout import Layout
from ppf.space.mask import Mask


@contextmanager
def masked(model: PreTrainedModel, layout: Layout, mask: Mask) -> Iterator[PreTrainedModel]:
    """Zeroes what removed units feed into their readers while the block runs.

    Args:
        model: The dense model.
        layout: Its layout.
        mask: Which units stay.

    Yields:
        The same model. Its logits equal those of the cut model up to rounding.
    """
    with ExitStack() as stack:
        for site, bits in zip(layout.sites, mask.bits, strict=True):
            if bits.all():
                continue
            reader = linear(model, site.reader)
            columns = torch.from_numpy(bits.copy()).repeat_interleave(site.columns).to(reader.weight)
            stack.callback(reader.register_forward_pre_hook(_multiply(columns)).remove)
        yield model


def _multiply(columns: torch.Tensor):
    def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] * columns, *inputs[1:])

    return hook
