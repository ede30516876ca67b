"""A measured objective: how much of the search text it asks on, and what it says that costs."""

from types import SimpleNamespace

import numpy as np
import pytest

from ppf.decide import Decider
from ppf.recipes.bench import Measured
from ppf.samples import Measurement


@pytest.mark.parametrize("blocks", [1, 2, 5, 12, 16, 100])
@pytest.mark.parametrize("fraction", [8, 2, 1])
def test_a_measured_objective_costs_what_it_says(fitted, blocks, fraction):
    decider, asked = Decider(fitted.folder), []

    def answers(masks, part, rows):
        asked.append((part, rows))
        bad = Measurement(1.0, float("nan"), len(rows) * 16, 0.0, "")
        return [bad, *(Measurement(1.0, float(place), len(rows) * 16, 0.0) for place in range(1, len(masks)))]

    lab = SimpleNamespace(text=SimpleNamespace(search=np.zeros((blocks, 16))), answers=answers)
    measured = Measured(SimpleNamespace(lab=lab, importance=decider.importance, layout=decider.layout), fraction)
    found = measured.ask(np.stack([decider.layout.floors, decider.layout.units, decider.layout.units]))
    assert found.tolist() == [np.inf, 1.0, 2.0]
    ((part, rows),) = asked
    assert part == "search" and len(set(rows)) == len(rows) >= 1 and max(rows) < blocks
    assert measured.tokens == pytest.approx(3 * measured.cost * blocks * 16)
    assert fraction != 1 or measured.cost == 1
    assert len(rows) == 1 or set(np.diff(rows)) == {fraction}
