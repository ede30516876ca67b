"""A policy network that is trained through the predictor's gradient: the corrected estimator once more, in torch.

Kept units are continuous here and the curves straight between whole units; the budget is met by one offset, differentiated
implicitly. Only the finished policy is rounded: asking about whole allocations with the gradient passed straight through
the rounding gained a sixth less.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from ppf.learn.objective import CAUTION
from ppf.learn.predictor import Corrected
from ppf.learn.process import NOISE
from ppf.learn.threads import one_thread
from ppf.space.layout import Layout
from reinforcement import PruningEnv, small_network


class Twin:
    """The objective of a corrected estimator on Float[N, S] kept units."""

    def __init__(self, estimator: Corrected) -> None:
        process = estimator.correction
        self.units, self.table = torch.from_numpy(estimator.units), torch.from_numpy(estimator.table).double()
        self.starts = torch.from_numpy(estimator.curves.starts)
        self.directions, self.sizes, self.gone, self.scales, self.weights, self.inverse = (
            torch.from_numpy(np.asarray(part, dtype=np.float64))
            for part in (process.directions, process.sizes, process.gone, process.scales, process.weights, process.inverse)
        )
        self.hyper = [float(value) for value in process.hyper]

    def __call__(self, kept: torch.Tensor) -> torch.Tensor:
        """Float[N]: predicted damage and ``CAUTION`` standard deviations."""
        a, angle, size, b, c, d, floor, small, mean = self.hyper
        damages = self._damages(kept)
        total = damages.sum(1) + NOISE
        gone = 1 - kept / self.units
        u, t, x = (damages.clamp(min=1e-12) / total[:, None]).sqrt(), total.log(), gone / self.scales
        cosine, gap, there = (u @ self.directions.T) ** 2, (t[:, None] - self.sizes) ** 2, self.gone / self.scales
        far = (x**2).sum(1)[:, None] + (there**2).sum(1) - 2 * x @ there.T
        cross = a**2 * ((cosine - 1) / angle**2 - gap / (2 * size**2)).exp() + b**2 * (1 + cosine)
        walk = torch.minimum(gone[:, None], self.gone).mean(2)
        cross = cross + c**2 * (-far.clamp(min=0) / 2).exp() + d**2 * walk
        itself = (u**2).sum(1) ** 2
        own = a**2 * ((itself - 1) / angle**2).exp() + b**2 * (1 + itself) + c**2 + d**2 * gone.mean(1)
        variance = (own - ((cross @ self.inverse.T) ** 2).sum(1)).clamp(min=0) + floor**2 + (small * NOISE / total) ** 2
        scaled = total * (mean + cross @ self.weights).clamp(-5, 5).exp()
        return (scaled - NOISE).clamp(min=0) + CAUTION * scaled * variance.sqrt()

    def _damages(self, kept: torch.Tensor) -> torch.Tensor:
        """Float[N, S]: straight between whole units."""
        below = torch.minimum(kept.detach().floor().long(), self.units - 1)
        part = kept - below
        return self.table[self.starts + below] * (1 - part) + self.table[self.starts + below + 1] * part


def continuous(wishes: torch.Tensor, target: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Float[N, S]: kept units, not whole, of Float[N, S] wishes that are shifted to keep Float[N] parameters."""
    units, dense, floors = (
        torch.tensor(of, dtype=torch.float64) for of in (layout.units, layout.units * layout.costs, layout.floors / layout.units)
    )
    with torch.no_grad():
        least, most = -wishes.amax(1, keepdim=True), 1 - wishes.amin(1, keepdim=True)
        for _ in range(50):
            offset = (least + most) / 2
            over = (torch.maximum(wishes + offset, floors).clamp(max=1) @ dense)[:, None] > target[:, None]
            least, most = torch.where(over, least, offset), torch.where(over, offset, most)
        free = ((wishes + offset > floors) & (wishes + offset < 1)) * dense
        share = free / free.sum(1, keepdim=True).clamp(min=1)
    moved = wishes + offset - (share * (wishes - wishes.detach())).sum(1, keepdim=True)  # the offset answers every wish
    return torch.maximum(moved, floors).clamp(max=1) * units


@one_thread()
def by_gradient(
    env: PruningEnv, twin: Callable[[torch.Tensor], torch.Tensor], questions: int, seed: int, batch: int = 16
) -> nn.Module:
    """Trains a network from states to corrections; a question is an allocation whose damage and gradient are asked for."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    network = small_network(env, generator)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    rounds = questions // batch
    for round in range(rounds):
        done = round / max(rounds - 1, 1)
        optimiser.param_groups[0]["lr"] = 3e-3 * 0.03**done
        places = env.places(batch, rng)
        start = torch.from_numpy(env.start.keep[env.start.rows(env.ratios[places])]).double()
        wishes = start + network(torch.from_numpy(env.states[places]))
        soft = continuous(wishes, torch.from_numpy(env.layout.prunable - env.remove[places]).double(), env.layout)
        loss = (torch.log(twin(soft) + NOISE) - torch.from_numpy(env.baseline[places])).mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimiser.step()
    return network
