"""Budget: how many parameters must go, in whichever words the wish was said."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from ppf.errors import InputError
from ppf.space.layout import Layout

_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
_MOST_STEP = 2**24
_BYTES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Budget:
    """Parameters to remove.

    Attributes:
        remove: At least so many go; ``allocate`` says how many more.
    """

    remove: int

    @classmethod
    def from_ratio(cls, ratio: float, layout: Layout, align: int = 1, tp: int = 1) -> "Budget":
        """Removes a share of the prunable parameters.

        Args:
            ratio: In [0, 1).
            layout: Of the dense model.
            align: FFN channels stay in multiples of this, which raises the floor.
            tp: KV groups and channels do too.

        Raises:
            InputError: Not a number in [0, 1), or more than the floors allow.
        """
        if isinstance(ratio, int) and not -_MOST_STEP < ratio < _MOST_STEP:  # no float holds it, nor does Python print it
            raise InputError("a pruning ratio must lie in [0, 1); a number far outside came; 0.3 removes 30 %")
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float, np.floating)) or not math.isfinite(ratio):
            raise InputError(f"a pruning ratio must be a number in [0, 1); {ratio!r} came; try 0.3")
        if not 0 <= ratio < 1:
            raise InputError(f"a pruning ratio must lie in [0, 1); {ratio:g} came; 0.3 removes 30 % of the prunable parameters")
        return cls(removed(ratio, layout))._feasible(layout, align, tp, f"ratio {ratio:g}")

    @classmethod
    def from_params(cls, params: int, layout: Layout, align: int = 1, tp: int = 1) -> "Budget":
        """Leaves at most ``params`` parameters in the whole model.

        Raises:
            InputError: Below what the floors leave.
        """
        return cls._leaving(params, layout, align, tp)._feasible(layout, align, tp, f"{params:,} parameters")

    @classmethod
    def from_memory(
        cls, size: int, layout: Layout, bytes_per_param: float, align: int = 1, tp: int = 1, headers: int = 0
    ) -> "Budget":
        """Leaves weights and ``headers`` of at most ``size`` bytes together, at ``bytes_per_param``.

        Raises:
            InputError: Below what the floors leave.
        """
        budget = cls._leaving(math.floor((size - headers) / bytes_per_param), layout, align, tp)
        return budget._feasible(layout, align, tp, f"{size:,} bytes")

    @classmethod
    def _leaving(cls, params: int, layout: Layout, align: int, tp: int) -> "Budget":
        """What must go for so many to stay. What goes with the last units of sites may do the rest."""
        floors, remove = aligned_floors(layout, align, tp), max(0, layout.total - params)
        return cls(min(remove, _most(layout, align, tp)) if params >= int(layout.kept_params(floors)) else remove)

    def ratio(self, layout: Layout) -> float:
        """The share of the prunable parameters that this budget removes."""
        return self.remove / layout.prunable

    def _feasible(self, layout: Layout, align: int, tp: int, wish: str) -> "Budget":
        if self.remove > _most(layout, align, tp):
            smallest = int(layout.kept_params(aligned_floors(layout, align, tp)))
            grid = " and ".join(f"--{name} {step}" for name, step in (("align", align), ("tp", tp)) if step > 1)
            raise InputError(
                f"at most ratio {largest_ratio(layout, align, tp):g} of what is prunable can go{' with ' if grid else ''}{grid} "
                f"({smallest:,} parameters stay); {wish} asks for ratio {self.ratio(layout):.4g}; "
                f"ask for less{', or for smaller steps' if grid else ''}"
            )
        return self


def removed(ratio: float, layout: Layout) -> int:
    """Parameters that a ratio asks to remove: the share of the prunable ones, rounded up."""
    return math.ceil(ratio * layout.prunable - 1e-6)


def largest_ratio(layout: Layout, align: int = 1, tp: int = 1) -> float:
    """The ratio at which every site is at its floor, rounded down to four digits, so that it can be asked for."""
    return math.floor(_most(layout, align, tp) / layout.prunable * 1e4) / 1e4


def _most(layout: Layout, align: int, tp: int) -> int:
    """Parameters that can go."""
    return int((layout.units - aligned_floors(layout, align, tp)) @ layout.costs)


def aligned_floors(layout: Layout, align: int, tp: int = 1) -> np.ndarray:
    """Int[S]: floors, raised to a whole step at every site (or all of a narrower FFN); see ``unit_steps``."""
    steps = unit_steps(layout, align, tp)
    return np.minimum(-(-layout.floors // steps) * steps, layout.units)


def unit_steps(layout: Layout, align: int, tp: int = 1) -> np.ndarray:
    """Int[S]: units are kept in multiples of this, or all of them.

    Args:
        layout: Of the dense model.
        align: Multiple for channels.
        tp: Multiple for KV groups and for channels, so that tensor parallelism over so many devices splits every layer evenly.

    Raises:
        InputError: One of them is no positive whole number, or the dense model itself cannot be split ``tp`` ways.
    """
    _check_step(align, "the alignment must be a positive number of channels", "use 1, 32, 64, 128 or 256")
    _check_step(tp, "tensor parallelism must be over a positive number of devices", "use 1, 2, 4 or 8")
    for site in layout.sites:
        if site.units % tp:
            what = f"the dense model's {site.units} {'KV groups' if site.kind == 'attn' else 'channels'} in {site.label}"
            raise InputError(f"{what} must be a multiple of --tp; {tp} came; use a divisor of them")
    return np.array([tp if site.kind == "attn" else math.lcm(align, tp) for site in layout.sites], dtype=np.int64)


def _check_step(value: int, must: str, todo: str) -> None:
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 1 <= value <= _MOST_STEP:
        raise InputError(f"{must}, at most {_MOST_STEP}; {value!r} came; {todo}")


def parse_count(text: str) -> int:
    """Reads a number of parameters such as ``3M``, ``1.5B`` or ``2000000``.

    Raises:
        InputError: Not such a number.
    """
    return _parse(text, _DECIMAL, "a number of parameters such as 3M or 1.5B")


def parse_size(text: str) -> int:
    """Reads a size in bytes such as ``500MiB``, ``8GB`` or ``1000000B``.

    Raises:
        InputError: Not such a size.
    """
    return _parse(text, _BYTES, "a size such as 500MiB or 8GB")


def _parse(text: str, units: dict[str, int], wanted: str) -> int:
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    amount = int(Fraction(match[1]) * units.get(match[2].upper(), 0)) if match else 0  # exact: 1.001 is no float
    if amount < 1:
        raise InputError(f"{wanted} must be given; {text!r} came; its units are {', '.join(filter(None, units))}")
    return amount
