import math

import pytest

from builders import refuses
from ppf.errors import DamagedError, InputError, InUseError, NewerError, ResourceError, UnsupportedError
from ppf.llm.engines.service import from_line, to_line, to_refusal
from ppf.samples import Measurement


@pytest.mark.parametrize("log_ppl", [2.5, 1e-300, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reason", ["", 'why: "x"\nü'])
def test_answers_are_single_lines_of_strict_json(log_ppl, reason):
    line = to_line(Measurement(log_ppl, 0.1, 4096, 1 / 3, reason))
    assert "\n" not in line and "NaN" not in line and "Infinity" not in line
    again = from_line(line.encode() + b"\n")
    assert (again.kl, again.tokens, again.seconds, again.reason) == (0.1, 4096, 1 / 3, reason)
    assert again.log_ppl == log_ppl if math.isfinite(log_ppl) else math.isnan(again.log_ppl)


@pytest.mark.parametrize("kind", [InputError, UnsupportedError, DamagedError, NewerError, ResourceError, InUseError])
def test_a_refusal_comes_out_as_it_was_raised(kind):
    with refuses(kind) as caught:
        from_line(to_refusal(kind("a must be\nb; it is ü; mend it")).encode() + b"\n")
    assert str(caught.value) == "a must be\\nb; it is ü; mend it"
