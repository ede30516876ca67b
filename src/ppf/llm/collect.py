"""Which masks to measure, and measuring them so that a stop at any moment loses nothing.

    probes    each site alone at a few levels: the single-site damage curves
    spread    random policies: every ratio, from nearly uniform to wild, around a given policy
    heldout   masks of one size spread around a good policy: never fitted, only predicted

The caller chooses the policies; nothing here knows a predictor.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ppf.errors import DamagedError, ResourceError
from ppf.llm.engines.bench import Engine
from ppf.samples import Sample, SampleStore
from ppf.space.allocation import Allocation, allocate
from ppf.space.budget import Budget
from ppf.space.importance import Importance
from ppf.space.layout import Layout
from ppf.space.mask import Mask, select
from ppf.space.policy import Policy

_LATEST, _MOST_FAILED = 50, 0.2


@dataclass(frozen=True, eq=False)
class Wanted:
    """A mask to measure and why.

    Attributes:
        allocation: Int[S] kept units.
        purpose: As in ``Sample``.
        ratio: Nominal pruning ratio of its group.
    """

    allocation: Allocation
    purpose: str
    ratio: float


class Failures:
    """Ends a run in which too much fails: it would go on for hours and learn from what is left."""

    def __init__(self) -> None:
        self._latest: deque[bool] = deque(maxlen=_LATEST)

    def count(self, sample: Sample) -> None:
        """One more sample.

        Raises:
            DamagedError: Of the latest 50 more than a fifth failed, for numbers that are not finite.
            ResourceError: They failed for want of something.
        """
        self._latest.append(sample.status == "failed")
        if sum(self._latest) > _MOST_FAILED * _LATEST:
            kind = DamagedError if sample.reason.startswith("not finite") else ResourceError
            what = (
                f"at most {_MOST_FAILED:.0%} of {_LATEST} masks may fail; {sum(self._latest)} of the latest {len(self._latest)} did"
            )
            raise kind(f"{what}, the last one: {sample.reason}; mend that, or try --dtype float32; what was measured is kept")


def probes(layout: Layout, levels: Sequence[float]) -> list[Wanted]:
    """Each site alone at each level.

    Args:
        layout: Of the dense model.
        levels: Kept shares in [0, 1); 0 means the site's floor.

    Returns:
        Site after site, without repetition; sites that cannot shrink have none.
    """
    wanted = []
    for index, site in enumerate(layout.sites):
        kept = {max(site.floor, round(level * site.units)) for level in levels} - {site.units}
        for count in sorted(kept, reverse=True):
            allocation = layout.units.copy()
            allocation[index] = count
            ratio = (site.units - count) * site.cost / layout.prunable
            wanted.append(Wanted(Allocation(allocation), "probe", ratio))
    return wanted


def spread(
    layout: Layout, centres: Sequence[tuple[float, Policy]], scales: Sequence[float], purpose: str, rng: np.random.Generator
) -> list[Wanted]:
    """Policies scattered around centres, each at its centre's ratio.

    Args:
        layout: Of the dense model.
        centres: (ratio, policy) pairs; one mask is drawn for each.
        scales: Standard deviations of the wished keep-ratio; used in turn.
        purpose: As in ``Sample``.
        rng: Source of randomness.
    """
    wanted = []
    for index, (ratio, centre) in enumerate(centres):
        noise = rng.normal(0, scales[index % len(scales)], len(layout.sites))
        allocation = allocate(Policy(centre.keep + noise), Budget.from_ratio(ratio, layout), layout)
        wanted.append(Wanted(allocation, purpose, ratio))
    return wanted


def stratified_ratios(low: float, high: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """Float[count]: one ratio from each of ``count`` equal strata, shuffled."""
    return rng.permutation(low + (high - low) * (np.arange(count) + rng.random(count)) / max(count, 1))


def collect(
    engine: Callable[[], Engine],
    store: SampleStore,
    wanted: Sequence[Wanted],
    importance: Importance,
    layout: Layout,
    round: int,
    advance: Callable[[Sample], None],
) -> Iterator[Sample]:
    """Measures what the store lacks or holds as failed, and commits each result as it comes.

    Args:
        engine: Gives the engine; not called if everything is there.
        store: Open for writing.
        wanted: The masks.
        importance: Order of the units.
        layout: Of the dense model.
        round: Kept with each sample.
        advance: Told each sample that is ready, for progress.

    Yields:
        One sample for each different mask of ``wanted``, those at hand first.
    """
    missing = []
    for item, mask in _different(wanted, importance, layout):
        sample = store.get(mask.digest)
        if sample is None or sample.status == "failed":  # what failed, for want of memory say, may succeed this time
            missing.append((item, mask))
        else:
            advance(sample)
            yield sample
    if not missing:
        return
    for place, result in engine().measure([mask for _, mask in missing]):
        item, mask = missing[place]
        sample = Sample.of(mask, store.context, item.purpose, item.ratio, round, result)
        store.add(sample)
        advance(sample)
        yield sample


def _different(wanted: Sequence[Wanted], importance: Importance, layout: Layout) -> list[tuple[Wanted, Mask]]:
    """Each mask once, for the first who wants it."""
    found: dict[str, tuple[Wanted, Mask]] = {}
    for item in wanted:
        mask = select(item.allocation, importance, layout)
        found.setdefault(mask.digest, (item, mask))
    return list(found.values())
