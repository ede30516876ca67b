"""What a cut does to a dense model besides dropping rows and columns: norms over what stays, and sub-layers that are gone.

A norm over all units of a site at once norms what stays as if the rest had never been:

    y_i = w_i x_i / sqrt(mean over what stays of x^2 + eps)

A norm that averages over all its columns computes that when removed ones come in as zeros, and what stays comes in times
sqrt(all / kept) and leaves divided by it.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.llm.architectures import linear
from ppf.space.layout import Site


@contextmanager
def as_cut(model: PreTrainedModel, cuts: Iterable[tuple[Site, np.ndarray]]) -> Iterator[None]:
    """Norms only what stays, and lets a site without a unit add nothing, no bias either, while the block runs.

    Args:
        model: The dense model.
        cuts: Sites with Bool[U], which units stay.
    """
    with ExitStack() as stack:
        for site, bits in cuts:
            if not bits.any():
                reader = linear(model, site.reader)
                stack.callback(reader.register_forward_hook(lambda _, __, output: torch.zeros_like(output)).remove)
                continue
            for rows in () if bits.all() else site.norms:
                norm = model.get_submodule(rows.module)
                scale = (bits.size / bits.sum()) ** 0.5
                columns = torch.from_numpy(np.repeat(bits * scale, rows.width)).to(norm.weight.dtype)
                stack.callback(norm.register_forward_pre_hook(multiply(columns)).remove)
                stack.callback(norm.register_forward_hook(lambda _, __, output, by=scale: output / by).remove)
        yield


def multiply(columns: torch.Tensor) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]]:
    """A hook that multiplies what a module reads by Float[C]; where the module runs is known by what it reads."""

    def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal columns
        columns = columns.to(inputs[0].device)
        return (inputs[0] * columns, *inputs[1:])

    return hook
