"""Ridge: what the readers keep is fitted again, so that they write what they wrote in the dense model.

    W_new = argmin |X_dense W_dense^T - X_kept W_new^T|^2 / T + lambda |W_new - W_kept|^2
          = W_kept + (W_dense C_dk - W_kept C_kk) (C_kk + lambda 1)^-1

    C_dk = X_dense^T X_kept / T,   C_kk = X_kept^T X_kept / T,   lambda = penalty * mean(diag C_kk)

X_kept is what a reader's kept columns read: in the dense model, or (``sequential``) in the model whose sites below are cut and
fitted already, so that each site also mends what those below it left. Layers run one at a time over the text, so that
the second moments of one reader are all that is held beside the text's hidden states.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ppf.errors import DamagedError, InputError
from ppf.llm.architectures import linear, stack_of
from ppf.llm.norms import as_cut
from ppf.llm.scores import exact
from ppf.space.layout import Layout, Site
from ppf.space.mask import Mask

PENALTY = 0.1
"""As a share of the mean square of the kept inputs; see docs/log.md for what was tried."""
_LEAST = 1e-12


@dataclass(frozen=True, eq=False)
class RidgeWeights:
    """New weights of the readers.

    Attributes:
        weights: Per site Float[out_features, kept columns], on the CPU.
    """

    weights: tuple[torch.Tensor, ...]

    def check(self, model: PreTrainedModel, layout: Layout, mask: Mask) -> None:
        """Refuses weights that do not fit.

        Raises:
            DamagedError: They were fitted to another model or mask.
        """
        shapes = [tuple(weight.shape) for weight in self.weights]
        wanted = [
            (linear(model, site.reader).out_features, int(bits.sum()) * site.columns)
            for site, bits in zip(layout.sites, mask.bits, strict=True)
        ]
        if shapes != wanted:
            raise DamagedError("ridge weights must be those of this model and mask; others came; fit them again")


@torch.inference_mode()
def fit_ridge(
    model: PreTrainedModel, layout: Layout, mask: Mask, blocks: np.ndarray, penalty: float = PENALTY, sequential: bool = True
) -> RidgeWeights:
    """Fits the kept columns of every reader again; the model is not changed.

    Args:
        model: The dense model.
        layout: Its layout.
        mask: Which units stay.
        blocks: Int[B, L] calibration tokens.
        penalty: Pulls towards the weights as they were; towards infinity nothing changes.
        sequential: Fit each site to what it reads when the sites below are cut and fitted.

    Raises:
        InputError: No token, a penalty that is not positive, or inputs that are not finite.

    Reference: arXiv:2312.11983 fits biases alone; least squares on kept inputs is in arXiv:1707.06168 (differs: pulled
    towards the weights as they were, not towards zero, and for a mask that is given).
    """
    if not penalty > 0:
        raise InputError(f"a ridge penalty must be positive; {penalty!r} came; {PENALTY:g} is usual")
    if not blocks.size:
        raise InputError("a ridge needs calibration text; no token came; give at least one block")
    stream, weights = _Layers(model, blocks), []
    dense = ours = stream.embedded
    for layer in range(layout.layers):
        change = _Change(cuts=[(site, bits) for site, bits in zip(layout.sites, mask.bits, strict=True) if site.layer == layer])
        for site, bits in change.cuts:
            keep = torch.from_numpy(np.repeat(bits, site.columns)).to(model.device)
            pairs = stream.pairs(site, dense, ours if sequential else None, change)
            new = _solved(linear(model, site.reader).weight, keep, pairs, penalty)
            change.patches[site.reader] = _widened(linear(model, site.reader), keep, new)
            weights.append(new.cpu())
        if sequential:
            ours = stream.through(layer, ours, change)
        dense = stream.through(layer, dense, _Change())
    return RidgeWeights(tuple(weights))


def _solved(
    weight: torch.Tensor, keep: torch.Tensor, pairs: Iterator[tuple[torch.Tensor, torch.Tensor]], penalty: float
) -> torch.Tensor:
    """Float[out, kept columns]: the formula above, from the reader's inputs in the dense and in our model, block by block."""
    dense = exact(weight.detach())
    kept = dense[:, keep]
    cross = dense.new_zeros(len(keep), kept.shape[1])
    square = dense.new_zeros(kept.shape[1], kept.shape[1])
    tokens = 0
    for theirs, ours in pairs:
        narrow = exact(ours)[:, keep]
        cross += exact(theirs).T @ narrow
        square += narrow.T @ narrow
        tokens += len(narrow)
    if not tokens or not kept.numel():  # no token of the text reaches this expert, or nothing stays
        return kept.to(torch.promote_types(weight.dtype, torch.float32))
    right, square = (dense @ cross - kept @ square) / tokens, square / tokens
    if not (torch.isfinite(square).all() and torch.isfinite(right).all()):
        raise InputError("what the readers read must be finite; it is not; use another text or precision")
    diagonal = square.diagonal()  # a view: adding to it is adding to the matrix
    diagonal += max(penalty * float(diagonal.mean()), _LEAST)
    return (kept + torch.linalg.solve(square, right, left=False)).to(torch.promote_types(weight.dtype, torch.float32))


@dataclass(frozen=True)
class _Change:
    """What turns the dense model, or a layer of it, into ours.

    Attributes:
        patches: New weights of readers, by path; zeros stand where columns went.
        cuts: Sites with Bool[U], which units stay; see ``as_cut``.
    """

    patches: dict[str, torch.Tensor] = field(default_factory=dict)
    cuts: list[tuple[Site, np.ndarray]] = field(default_factory=list)


class _Layers:
    """One text on its way through a model, layer by layer; one Float[1, L, H] a block.

    Args:
        model: The dense model.
        blocks: Int[B, L] tokens.
    """

    def __init__(self, model: PreTrainedModel, blocks: np.ndarray) -> None:
        self.model, self.layers = model, stack_of(model)
        ids = torch.from_numpy(np.ascontiguousarray(blocks)).to(model.device, torch.long)
        self.embedded: list[torch.Tensor] = []
        self.settings: list[dict[str, Any]] = []
        with ExitStack() as stack:
            for layer in self.layers:
                keep = layer.register_forward_pre_hook(lambda _, inputs, named: self.settings.append(named), with_kwargs=True)
                stack.callback(keep.remove)
            model(input_ids=ids[:1], use_cache=False)  # masks and positions are those of every block
        handle = self.layers[0].register_forward_pre_hook(self._stop)
        try:
            for row in ids:
                with suppress(_Embedded):
                    model(input_ids=row[None], use_cache=False)
        finally:
            handle.remove()

    def _stop(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        """Keeps what the first layer reads, whatever a family makes of its embeddings; the rest need not run."""
        self.embedded.append(inputs[0])
        raise _Embedded

    def through(self, layer: int, hidden: list[torch.Tensor], change: _Change) -> list[torch.Tensor]:
        """What the next layer reads, with some of this one changed."""
        with _changed(self.model, change):
            return [self.layers[layer](one, **self.settings[layer]) for one in hidden]

    def pairs(
        self, site: Site, dense: list[torch.Tensor], ours: list[torch.Tensor] | None, change: _Change
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Float[L, U * C] twice a block: what a reader reads in the dense model, and in ours (None: the dense one again).

        To an expert other tokens come in ours than in the dense model, so that it is fitted to the dense one alone.
        """
        for index, one in enumerate(dense):
            theirs = self._read(site, one, _Change())
            yield theirs, theirs if ours is None or site.role == "expert" else self._read(site, ours[index], change)

    def _read(self, site: Site, hidden: torch.Tensor, change: _Change) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        reader = linear(self.model, site.reader)
        hook = reader.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1, reader.in_features)))
        try:
            self.through(site.layer, [hidden], change)
        finally:
            hook.remove()
        return seen[0] if seen else hidden.new_zeros(0, reader.in_features)


class _Embedded(Exception):
    """Ends a run through the model behind its embeddings."""


def _widened(reader: nn.Linear, keep: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Float[out, in]: kept columns as given, zeros elsewhere."""
    wide = torch.zeros_like(reader.weight)
    wide[:, keep] = weight.to(wide)
    return wide


@contextmanager
def _changed(model: PreTrainedModel, change: _Change) -> Iterator[None]:
    """The model with a change while the block runs."""
    with ExitStack() as stack:
        stack.enter_context(as_cut(model, change.cuts))
        for name, weight in change.patches.items():
            reader = linear(model, name)
            stack.callback(setattr, reader, "weight", reader.weight)
            reader.weight = nn.Parameter(weight, requires_grad=False)
        yield
