"""Mask: which units stay, as bits; and the mask matrix, the picture of a mask that a predictor reads."""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ppf.errors import DamagedError, InputError
from ppf.space.allocation import Allocation
from ppf.space.importance import Importance, check_units
from ppf.space.layout import Layout


@dataclass(frozen=True, eq=False)
class Mask:
    """Kept units of every site.

    Attributes:
        bits: Per site Bool[U]; True stays.

    Raises:
        InputError: A row that does not hold True and False alone.
    """

    bits: tuple[np.ndarray, ...]

    def __post_init__(self) -> None:
        bits = tuple(_row(site, index) for index, site in enumerate(self.bits))
        object.__setattr__(self, "bits", bits)

    @cached_property
    def allocation(self) -> Allocation:
        """How many units stay at each site."""
        return Allocation(np.array([site.sum() for site in self.bits]))

    def pack(self) -> bytes:
        """All bits in site order, eight to a byte."""
        return np.packbits(np.concatenate(self.bits)).tobytes()

    @classmethod
    def unpack(cls, data: bytes, layout: Layout) -> "Mask":
        """The inverse of ``pack``.

        Raises:
            DamagedError: Another number of bits than the layout has units.
        """
        total = int(layout.units.sum())
        if len(data) != -(-total // 8):
            raise DamagedError(f"a mask of this model must be {-(-total // 8)} bytes; {len(data)} came; it is of another model")
        flat: np.ndarray = np.unpackbits(np.frombuffer(data, dtype=np.uint8))[:total].astype(bool)
        return cls(tuple(np.split(flat, np.cumsum(layout.units)[:-1])))

    @cached_property
    def digest(self) -> str:
        """Hash of the packed bits: the mask's name in the sample store."""
        return hashlib.sha256(self.pack()).hexdigest()[:32]


def _row(bits: object, index: int) -> np.ndarray:
    """Bool[U], read-only: a number, a text or a NaN is no bit, though Python would take it for one.

    Raises:
        InputError: Anything else.
    """
    try:
        row = np.array(bits)
    except (TypeError, ValueError):  # rows of different lengths
        row = np.array(None)
    if row.ndim != 1 or row.dtype != bool:
        came = f"{row.dtype} of shape {row.shape} came"
        raise InputError(f"a mask must have one row of True and False for each site; for site {index} {came}; convert it")
    row.flags.writeable = False
    return row


def check_mask(mask: Mask, layout: Layout) -> None:
    """Refuses the mask of another model, and one that leaves a site less than it needs.

    Raises:
        InputError: Another number of sites or units, or fewer than the floor; the site is named.
    """
    if len(mask.bits) != len(layout.sites):
        raise InputError(f"a mask must have the {len(layout.sites)} sites of its model; {len(mask.bits)} came; use its own")
    for bits, site in zip(mask.bits, layout.sites, strict=True):
        if len(bits) != site.units:
            raise InputError(f"a mask must have {site.units} bits at {site.label}; {len(bits)} came; use the mask of this model")
        if bits.sum() < site.floor:
            raise InputError(f"a mask must keep at least {site.floor} at {site.label}; {int(bits.sum())} stay; keep more")


def select(allocation: Allocation, importance: Importance, layout: Layout) -> Mask:
    """Keeps the most important units of each site.

    Args:
        allocation: Int[S] how many stay.
        importance: The order inside each site.
        layout: Of the dense model.

    Returns:
        A mask whose allocation is the one given. Smaller allocations give subsets of larger ones.
    """
    check_units(importance.scores, layout.units, "importance")
    bits = []
    for kept, order in zip(allocation.kept, importance.order, strict=True):
        site: np.ndarray = np.zeros(len(order), dtype=bool)
        site[order[:kept]] = True
        bits.append(site)
    return Mask(tuple(bits))


def mask_matrices(kept: np.ndarray, units: np.ndarray, width: int) -> np.ndarray:
    """Mask matrices of allocations under importance order.

    Args:
        kept: Int[N, S] units that stay.
        units: Int[S] units of the dense model.
        width: Columns.

    Returns:
        Float[N, S, width]: columns filled from the left; column ``j`` is the share kept of the units whose rank lies
        in [j, j + 1) * U / width.
    """
    share = np.asarray(kept) / units
    return np.clip(share[..., None] * width - np.arange(width), 0.0, 1.0)
