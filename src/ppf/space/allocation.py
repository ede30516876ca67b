"""allocate: any policy becomes whole units that meet a budget, to within one channel wherever the channels can.

policy (wishes) ── shift all wishes together until the budget is met ── round KV groups ── shift channels again
                ── hand out what is left, channel by channel, to whoever lost most by rounding
"""

from dataclasses import dataclass

import numpy as np

from ppf.errors import InputError
from ppf.space.budget import Budget, aligned_floors, unit_steps
from ppf.space.layout import Layout
from ppf.space.policy import Policy

_GRID = 2.0**30  # wishes are told apart to about 1e-9, far below one channel and far above rounding noise


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


def allocate(policy: Policy, budget: Budget, layout: Layout, align: int = 1, tp: int = 1) -> Allocation:
    """Turns wishes into whole units.

    Args:
        policy: Float[S] wishes; a common offset changes nothing.
        budget: What must go.
        layout: Of the dense model.
        align: FFN channels stay in multiples of this (or all of them).
        tp: KV groups, and channels, stay in multiples of this.

    Returns:
        An allocation that removes at least the budget, and less than one step (a channel, or ``align`` of them) more if the
        channels between their floors and their widths are worth a KV group or more; if not, up to that much more.

    Raises:
        InputError: The policy has another number of sites or is not finite, or the floors cannot meet the budget.
    """
    return Allocation(allocate_many(policy.keep[None], np.array([budget.remove]), layout, align, tp)[0])


def allocate_many(keep: np.ndarray, remove: np.ndarray, layout: Layout, align: int = 1, tp: int = 1) -> np.ndarray:
    """``allocate`` for many policies at once.

    Args:
        keep: Float[N, S] wishes.
        remove: Int[N] parameters to remove.
        layout: Of the dense model.
        align: As in ``allocate``; so is ``tp``.

    Returns:
        Int[N, S] kept units.

    Raises:
        InputError: As in ``allocate``.
    """
    keep = np.asarray(keep, dtype=np.float64)
    if keep.ndim != 2 or keep.shape[1] != len(layout.sites):
        raise InputError(f"a policy must have {len(layout.sites)} sites as its model has; shape {keep.shape} came; use its own")
    if not np.isfinite(keep).all():
        raise InputError("a policy must be finite numbers; a NaN or an infinity came; mend it")
    steps, floors, units, costs = unit_steps(layout, align, tp), aligned_floors(layout, align, tp), layout.units, layout.costs
    target = layout.prunable - np.asarray(remove, dtype=np.int64)
    if (target < floors @ costs).any() or (target > layout.prunable).any():
        raise InputError(f"a budget must leave the floors ({int(floors @ costs):,} parameters); it does not; ask for less")
    keep, fine = _plain(keep), _cheapest_kind(layout, steps)
    wish = _shifted(keep, units, floors, costs, target)
    kept = np.where(fine, wish, np.clip(np.rint(wish / steps) * steps, floors, units)).astype(np.float64)
    kept = _make_room(kept, wish, fine, layout, floors, steps, target)
    rest = target - np.where(fine, 0, kept).astype(np.int64) @ costs
    exact = _shifted(keep[:, fine], units[fine], floors[fine], costs[fine], rest)
    kept[:, fine] = _fill(exact, units[fine], floors[fine], costs[fine], steps[fine], rest)
    return kept.astype(np.int64)


def _cheapest_kind(layout: Layout, steps: np.ndarray) -> np.ndarray:
    """Bool[S]: the sites whose steps are small enough to meet a budget exactly."""
    cheapest = layout.sites[int(np.argmin(layout.costs * steps))].role
    return np.array([site.role == cheapest for site in layout.sites])


def _plain(keep: np.ndarray) -> np.ndarray:
    """Wishes that lead to the same allocation, from 0 upwards, free of huge numbers and of rounding noise; Float[N, S].

    Only the gaps between neighbours count, and those up to 1 only: beyond, one site is full before the other leaves its floor.
    """
    order = keep.argsort(axis=1)
    ordered = np.take_along_axis(keep, order, axis=1)
    with np.errstate(over="ignore"):  # a gap that overflows is one above 1
        gaps = np.diff(ordered, axis=1, prepend=ordered[:, :1])
    plain = np.empty_like(keep)
    np.put_along_axis(plain, order, np.cumsum(np.rint(np.minimum(gaps, 1) * _GRID) / _GRID, axis=1), axis=1)
    return plain


def _shifted(keep: np.ndarray, units: np.ndarray, floors: np.ndarray, costs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Adds to each row the one offset at which the kept cost is the target; Float[N, S] units, not yet whole.

    The cost rises with the offset in straight pieces, which meet where a site leaves its floor or is full. On the piece that
    holds the target, the offset follows exactly.
    """
    bends = np.concatenate([floors / units - keep, 1 - keep], axis=1)
    order = bends.argsort(axis=1)
    bends = np.take_along_axis(bends, order, axis=1)
    dense = (units * costs).astype(np.float64)
    turns = np.concatenate([dense, -dense])[order]
    slopes = turns.cumsum(axis=1)
    spent = floors @ costs + ((slopes - turns) * np.diff(bends, axis=1, prepend=bends[:, :1])).cumsum(axis=1)
    piece = (spent <= target[:, None]).sum(axis=1, keepdims=True) - 1
    bend, slope, start = (np.take_along_axis(of, piece, axis=1) for of in (bends, slopes, spent))
    rest = target[:, None] - start
    offset = bend + np.divide(rest, slope, out=np.zeros_like(rest), where=slope > 0)
    return np.clip((keep + offset) * units, floors, units)


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
            old, step = kept[rows, site], steps[site]
            new = (old // step + 1) * step if sign > 0 else (old - 1) // step * step  # a full site may lie between two steps
            kept[rows, site] = np.clip(new, floors[site], units[site])
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
