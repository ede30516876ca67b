"""What a predictor reads of an allocation: the damage that each site alone does, from single-site measurements.

    kept Int[N, S] ── curve of each site ── damages Float[N, S], nats/token ── their sum: the additive prediction

A curve is a table with one entry per possible count, so that reading it is one lookup.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Curves:
    """Damage of each site alone by the units that it keeps.

    Attributes:
        units: Int[S], units of the dense sites.
        table: Float[sum(U + 1)], site after site: the damage with 0, 1, ... U units kept; it falls to 0 at U.
    """

    units: np.ndarray
    table: np.ndarray

    @cached_property
    def starts(self) -> np.ndarray:
        """Int[S]: where each site begins in the table."""
        return np.concatenate([[0], np.cumsum(self.units + 1)[:-1]])

    def damages(self, kept: np.ndarray) -> np.ndarray:
        """Float[..., S], nats/token, of Int[..., S] kept units."""
        return self.table[self.starts + kept]

    def site(self, index: int) -> np.ndarray:
        """Float[U + 1]: the curve of one site."""
        return self.table[self.starts[index] : self.starts[index] + self.units[index] + 1]
