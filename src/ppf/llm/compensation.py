"""Fill: what the readers read on average, to stand in for units that are gone.

    y = W_kept x_kept + W_removed x_removed   ~   W_kept x_kept + b,   b = W_removed E[x_removed]

Masking with a fill puts the mean into the removed columns; cutting with it turns their part of the output into a bias.
Both are one function.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from ppf.errors import InputError
from ppf.llm.architectures import linear
from ppf.llm.scores import moments
from ppf.space.importance import check_units
from ppf.space.layout import Layout


@dataclass(frozen=True, eq=False)
class Fill:
    """The mean input of every reader column.

    Attributes:
        means: Per site Float[U * columns], in the unit of the activations.
    """

    means: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        means = tuple(np.array(mean, dtype=np.float32) for mean in self.means)
        for mean in means:
            if mean.ndim != 1 or not np.isfinite(mean).all():
                raise InputError("mean inputs must be finite, one number a column; others came; use another text or precision")
            mean.flags.writeable = False
        object.__setattr__(self, "means", means)


def reader_means(model: PreTrainedModel, layout: Layout, blocks: np.ndarray) -> Fill:
    """The mean over all tokens of what each reader of the dense model reads; the model is not changed.

    Args:
        model: The dense model.
        layout: Its layout.
        blocks: Int[B, L] calibration tokens.

    Raises:
        InputError: No token, or an input that is not finite.

    Reference: arXiv:2312.11983, section on baseline bias compensation (differs: for any mask; of the dense model at every
    site, whatever is removed before it).
    """
    if not blocks.size:
        raise InputError("mean inputs need calibration text; no token came; give at least one block")
    seen = moments(model, [site.reader for site in layout.sites], blocks)
    return Fill(tuple(seen[site.reader].mean.numpy() for site in layout.sites))


def means_per_site(fill: Fill | None, layout: Layout) -> tuple[torch.Tensor | None, ...]:
    """Float[U * columns] for every site of a layout, or None for each where nothing is filled.

    Raises:
        DamagedError: The fill is of another model.
    """
    if fill is None:
        return (None,) * len(layout.sites)
    check_units(fill.means, [site.units * site.columns for site in layout.sites], "mean inputs")
    return tuple(torch.from_numpy(mean.copy()) for mean in fill.means)


def filled_bias(reader: torch.nn.Linear, removed: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """The bias of a reader that lost columns.

    Args:
        reader: Of the dense model; untouched.
        removed: Bool[in_features], True where a column goes.
        means: Float[in_features] mean inputs.

    Returns:
        Float[out_features] in the reader's dtype: what the removed columns gave on average, and its own bias if it has one.
    """
    weight = reader.weight.detach()
    exact = torch.promote_types(weight.dtype, torch.float32)  # a sum over many columns is lost in half precision
    removed = removed.to(weight.device)
    bias = weight[:, removed].to(exact) @ means.to(weight.device, exact)[removed]
    if reader.bias is not None:
        bias = bias + reader.bias.detach().to(exact)
    return bias.to(weight.dtype)


def bias_params(model: PreTrainedModel, layout: Layout, kept: np.ndarray) -> int:
    """Parameters that cutting with a fill adds when Int[S] units stay: a bias for each reader that stays and has none."""
    readers = [linear(model, site.reader) for site, count in zip(layout.sites, kept, strict=True) if count]
    return sum(reader.out_features for reader in readers if reader.bias is None)
