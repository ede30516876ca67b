"""Policy: how much of each site one would like to keep. Any numbers will do; ``allocate`` makes them feasible."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ppf.errors import DamagedError, InputError
from ppf.space.layout import Layout


@dataclass(frozen=True, eq=False)
class Policy:
    """A wish per site.

    Attributes:
        keep: Float[S], wished share of units to keep; need not lie in [0, 1] nor meet a budget.
    """

    keep: np.ndarray

    def __post_init__(self) -> None:
        keep = np.array(self.keep, dtype=np.float64)
        if keep.ndim != 1 or not np.isfinite(keep).all():
            raise InputError(f"a policy must be one finite number per site; shape {keep.shape} came, or a NaN; mend it")
        keep.flags.writeable = False
        object.__setattr__(self, "keep", keep)

    @classmethod
    def uniform(cls, layout: Layout) -> "Policy":
        """The same wish everywhere: ``allocate`` turns it into one ratio for all sites."""
        return cls(np.zeros(len(layout.sites)))

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready record; ``from_json`` is its inverse."""
        return {"keep": self.keep.tolist()}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Policy":
        """Rebuilds a policy.

        Raises:
            DamagedError: The record is not one that ``to_json`` made.
        """
        try:
            return cls(np.array(record["keep"], dtype=np.float64))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DamagedError(f"a policy record must hold 'keep', a list of numbers; {error!r}; mend it") from error
