"""layer_statistics: what the published heuristics read of a model. One pass over the text, one over the weights.

tokens ── moments of every linear input ──► outliers, variance, spread
       ── residual stream around each sub-layer ──► influence
weights ── singular values ──► alpha
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from ppf.llm.architectures import ends_of, linear
from ppf.llm.placement import weight_of
from ppf.llm.scores import Moments, exact, fluctuation, moments, per_unit
from ppf.space.layout import Layout
from ppf.space.statistics import Statistics

OUTLIER_FACTOR = 5.0
"""An outlier is so many times the mean of its layer (OWL's M)."""


def layer_statistics(model: PreTrainedModel, layout: Layout, blocks: np.ndarray) -> Statistics:
    """Measures a model, which is not changed.

    Args:
        model: The dense model.
        layout: Its layout.
        blocks: Int[B, L] calibration tokens.

    Raises:
        InputError: No tokens, or inputs of its modules that are not finite.
    """
    modules = _modules(layout)
    with _cosines(model, layout) as cosines:
        seen = moments(model, [name for names in modules.values() for name in names], blocks)
    columns = [fluctuation(model, site, seen) for site in layout.sites]
    outliers = {layer: _outliers(model, names, seen) for layer, names in modules.items()}
    alpha = _alphas(model, modules)
    return Statistics(
        np.array([outliers[site.layer] for site in layout.sites]),
        np.array([alpha[site.layer] for site in layout.sites]),
        (1 - cosines / blocks.size).numpy(),
        np.array([site.double().std(correction=0).item() for site in columns]),
        tuple(per_unit(score, site) for score, site in zip(columns, layout.sites, strict=True)),
    )


def _modules(layout: Layout) -> dict[int, list[str]]:
    """Per layer the linear modules of its sites, each once."""
    modules: dict[int, dict[str, None]] = {}
    for site in layout.sites:
        modules.setdefault(site.layer, {}).update(dict.fromkeys([*(rows.module for rows in site.writers), site.reader]))
    return {layer: list(names) for layer, names in modules.items()}


def _outliers(model: PreTrainedModel, names: list[str], seen: Moments) -> float:
    """Share of the entries |W_ij| * ||x_j|| of a layer that lie above ``OUTLIER_FACTOR`` times their mean.

    The norm is divided by the root of the number of tokens, which changes no share.

    Reference: arXiv:2310.05175, section 3 (LOD).
    """
    weights = {name: weight_of(linear(model, name)).float().abs() for name in names}
    norms = {name: (seen[name].square * seen[name].share).sqrt() for name in names}
    size = sum(weight.numel() for weight in weights.values())
    mean = sum(float(weight.sum(0).cpu().double() @ norms[name].double()) for name, weight in weights.items()) / size
    above = (weight * norms[name].to(weight.device) > OUTLIER_FACTOR * mean for name, weight in weights.items())
    return sum(int(entries.sum()) for entries in above) / size


def _alphas(model: PreTrainedModel, modules: dict[int, list[str]]) -> dict[int, float]:
    """Per layer the mean exponent of its matrices.

    A matrix without a tail has none, and a layer of such matrices counts as an average one.

    Reference: arXiv:2410.10912, section 3 (PL_Alpha_Hill).
    """
    found = {layer: [_hill(weight_of(linear(model, name))) for name in names] for layer, names in modules.items()}
    means = {layer: float(np.mean(known)) for layer, alphas in found.items() if (known := [a for a in alphas if a is not None])}
    average = float(np.mean(list(means.values()))) if means else 0.0
    return {layer: means.get(layer, average) for layer in modules}


def _hill(weight: torch.Tensor) -> float | None:
    """Hill's estimate of the power-law exponent of the eigenvalues of W^T W, from the larger half of those above zero.

    Returns:
        1 + k / sum_i log(l_i / l_(n - k)) over the k = n // 2 largest; None where these do not differ or are none.
    """
    singular = torch.linalg.svdvals(weight.float())  # from the largest down
    noise = singular[0] * max(weight.shape) * torch.finfo(torch.float32).eps  # below this, a zero that rounding moved
    logs = 2 * singular[singular > noise].cpu().double().log()
    half = len(logs) // 2
    tail = (logs[:half] - logs[half : half + 1]).sum().item() if half else 0.0
    return 1 + half / tail if tail > 1e-6 * half else None


@contextmanager
def _cosines(model: PreTrainedModel, layout: Layout) -> Iterator[torch.Tensor]:
    """Float[S]: over the tokens that run while it is open, sums of the stream's cosine before and after each sub-layer.

    What a reader gives is what its sub-layer adds to the stream, or a norm behind it; Granite multiplies that.

    Reference: arXiv:2403.03853, section 3 (block influence; differs: a sub-layer in place of a layer).
    """
    sums = torch.zeros(len(layout.sites), dtype=torch.float64)
    factor = float(getattr(model.config, "residual_multiplier", 1))
    with ExitStack() as stack:
        for index, site in enumerate(layout.sites):
            entrance, exit = ends_of(model, site)
            enter, leave = _around(sums[index], factor)
            stack.callback(entrance.register_forward_pre_hook(enter).remove)
            stack.callback(exit.register_forward_hook(leave).remove)
        yield sums


def _around(total: torch.Tensor, factor: float) -> tuple[Callable[..., None], Callable[..., None]]:
    """The hooks at both ends of one sub-layer; they add to ``total``."""
    stream: list[torch.Tensor] = []

    def enter(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        stream[:] = [inputs[0]]

    def leave(_: nn.Module, __: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        before = stream.pop()
        after = before + output * factor  # in the model's own precision: this is the stream that its next sub-layer sees
        total.add_(functional.cosine_similarity(exact(before), exact(after), dim=-1).sum().cpu())

    return enter, leave
