"""allocate: any policy becomes whole units that meet a budget to within one channel.

    policy (wishes) ── shift all wishes together until the budget is met ── round KV groups ── shift channels again
                    ── hand out what is left, channel by channel, to whoever lost most by rounding
"""

from dataclasses import dataclass

import numpy as np

from ppf.errors import InputError
from ppf.space.budget import Budget, aligned_floors, unit_steps
from ppf.space.layout import Layout
from ppf.space.policy import Policy

_BISECTIONS = 44


@dataclass(frozen=True, eq=False)
class Allocation:
    """Whole units that stay.

    Attributes:
        kept: Int[S], between the floor and the units of each site.
    """

    kept: np.ndarray

    def __post_init__(self) -> None:
        kept = np.array(self.kept, dtype=np.int64)
        kept.flags.writeable = False
        object.__setattr__(self, "kept", kept)


def allocate(policy: Policy, budget: Budget, layout: Layout, align: int = 1) -> Allocation:
    """Turns wishes into whole units.

    Args:
        policy: Float[S] wishes; a common offset changes nothing.
        budget: What must go.
        layout: Of the dense model.
        align: FFN channels stay in multiples of this (or all of them).

    Returns:
        An allocation that removes at least the budget and less than one step (a channel, or ``align`` of them) more.

    Raises:
        InputError: The policy has another number of sites, or the floors cannot meet the budget.
    """
    return Allocation(allocate_many(policy.keep[None], np.array([budget.remove]), layout, align)[0])


def allocate_many(keep: np.ndarray, remove: np.ndarray, layout: Layout, align: int = 1) -> np.ndarray:
    """``allocate`` for many policies at once.

    Args:
        keep: Float[N, S] wishes.
        remove: Int[N] parameters to remove.
        layout: Of the dense model.
        align: As in ``allocate``.

    Returns:
        Int[N, S] kept units.

    Raises:
        InputError: As in ``allocate``.
    """
    keep = np.asarray(keep, dtype=np.float64)
    if keep.ndim != 2 or keep.shape[1] != len(layout.sites):
        raise InputError(f"a policy must have {len(layout.sites)} sites as its model has; shape {keep.shape} came; use its own")
    steps, floors, units, costs = unit_steps(layout, align), aligned_floors(layout, align), layout.units, layout.costs
    target = layout.prunable - np.asarray(remove, dtype=np.int64)
    if (target < floors @ costs).any() or (target > layout.prunable).any():
        raise InputError(f"a budget must leave the floors ({int(floors @ costs):,} parameters); it does not; ask for less")
    fine = _cheapest_kind(layout, steps)
    wish = _shifted(keep * units, units, floors, costs, target)
    kept = np.where(fine, wish, np.clip(np.rint(wish / steps) * steps, floors, units)).astype(np.float64)
    kept = _make_room(kept, wish, fine, layout, floors, steps, target)
    rest = target - np.where(fine, 0, kept).astype(np.int64) @ costs
    exact = _shifted(keep[:, fine] * units[fine], units[fine], floors[fine], costs[fine], rest)
    kept[:, fine] = _fill(exact, units[fine], floors[fine], costs[fine], steps[fine], rest)
    return kept.astype(np.int64)


def _cheapest_kind(layout: Layout, steps: np.ndarray) -> np.ndarray:
    """Bool[S]: the sites whose steps are small enough to meet a budget exactly."""
    cheapest = layout.sites[int(np.argmin(layout.costs * steps))].kind
    return np.array([site.kind == cheapest for site in layout.sites])


def _shifted(wish: np.ndarray, units: np.ndarray, floors: np.ndarray, costs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Adds to each row one common share of the units so that the kept cost is the target; Float[N, S], not yet whole."""
    if wish.shape[1] == 0:
        return wish
    span = np.abs(wish / units).max(axis=1, keepdims=True) + 2.0
    low, high = -span, span
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        over = (np.clip(wish + middle * units, floors, units) @ costs)[:, None] > target[:, None]
        low, high = np.where(over, low, middle), np.where(over, middle, high)
    return np.clip(wish + low * units, floors, units)


def _make_room(
    kept: np.ndarray, wish: np.ndarray, fine: np.ndarray, layout: Layout, floors: np.ndarray, steps: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """Corrects rounded coarse units one by one until the fine sites can meet the target."""
    costs, units, coarse = layout.costs, layout.units, ~fine
    least, most = int(floors[fine] @ costs[fine]), int(units[fine] @ costs[fine])
    for sign, limit in ((1, most), (-1, least)):
        while True:
            spent = kept[:, coarse] @ costs[coarse]
            short = spent + limit < target if sign > 0 else spent + limit > target
            if not short.any():
                break
            bound = (kept < units) if sign > 0 else (kept > floors)
            gap = np.where(bound & coarse, sign * (wish - kept), -np.inf)
            rows, site = np.flatnonzero(short), gap.argmax(axis=1)[short]
            kept[rows, site] = np.clip(kept[rows, site] + sign * steps[site], floors[site], units[site])
    return kept


def _fill(
    exact: np.ndarray, units: np.ndarray, floors: np.ndarray, costs: np.ndarray, steps: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """Rounds down to whole steps and hands out what is left, largest remainder first."""
    kept = np.where(exact >= units - 1e-6, units, np.maximum(np.floor(exact / steps + 1e-9) * steps, floors)).astype(np.int64)
    over = kept @ costs > target
    while over.any():  # rounding up to a floor or to a full site may overspend by a hair
        gap = np.where(kept > floors, kept - exact, -np.inf)
        rows, site = np.flatnonzero(over), gap.argmax(axis=1)[over]
        kept[rows, site] = np.maximum((kept[rows, site] - 1) // steps[site] * steps[site], floors[site])
        over = kept @ costs > target
    left = target - kept @ costs
    while True:
        price = np.minimum(steps, units - kept) * costs
        fits = (price > 0) & (price <= left[:, None])
        if not fits.any():
            return kept
        order = np.argsort(-np.where(fits, (exact - kept) / steps, -np.inf), axis=1, kind="stable")
        paid = np.cumsum(np.take_along_axis(np.where(fits, price, 0), order, axis=1), axis=1)
        chosen = np.zeros_like(fits)
        np.put_along_axis(chosen, order, paid <= left[:, None], axis=1)
        chosen &= fits
        kept += np.where(chosen, np.minimum(steps, units - kept), 0)
        left = target - kept @ costs
