"""The dense model with readers that were fitted again: what a cut model must answer as."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.llm.architectures import linear
from ppf.llm.norms import as_cut
from ppf.llm.ridge import RidgeWeights
from ppf.space.layout import Layout
from ppf.space.mask import Mask


@contextmanager
def as_fitted(model: PreTrainedModel, layout: Layout, mask: Mask, fitted: RidgeWeights) -> Iterator[None]:
    """The model computing as if cut and fitted while the block runs; zeros stand where columns went."""
    with ExitStack() as stack:
        stack.enter_context(as_cut(model, list(zip(layout.sites, mask.bits, strict=True))))
        for site, bits, weight in zip(layout.sites, mask.bits, fitted.weights, strict=True):
            reader = linear(model, site.reader)
            wide = torch.zeros_like(reader.weight)
            wide[:, torch.from_numpy(np.repeat(bits, site.columns))] = weight.to(wide)
            stack.callback(setattr, reader, "weight", reader.weight)
            reader.weight = nn.Parameter(wide, requires_grad=False)
        yield
