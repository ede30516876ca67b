import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import examples, layout, refuses
from ppf.errors import DamagedError, InputError
from ppf.space.policy import Policy


def test_a_policy_owns_read_only_numbers():
    given_keep = np.array([0.5, 0.25])
    policy = Policy(given_keep)
    given_keep[0] = 9
    assert policy.keep.tolist() == [0.5, 0.25] and policy.keep.dtype == np.float64
    with pytest.raises(ValueError, match="read-only"):
        policy.keep[0] = 1


@pytest.mark.parametrize("keep", [np.zeros((2, 2)), 0.5, [np.nan, 0], [np.inf, 0], [-np.inf]])
def test_what_is_not_a_finite_number_per_site_is_refused(keep):
    with refuses(InputError):
        Policy(np.array(keep))


def test_uniform_wishes_the_same_for_every_site():
    keep = Policy.uniform(layout(layers=5)).keep
    assert keep.shape == (10,) and len(set(keep)) == 1


@examples(50)
@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=8))
def test_from_json_is_the_inverse_of_to_json(keep):
    again = Policy.from_json(json.loads(json.dumps(Policy(np.array(keep)).to_json())))
    np.testing.assert_array_equal(again.keep, np.array(keep))


@pytest.mark.parametrize(
    "record",
    [None, [], {}, {"keep": None}, {"keep": "much"}, {"keep": 3}, {"keep": [[1]]}, {"keep": [1, [2]]}, {"keep": [float("nan")]},
     {"keep": [1, None]}, {"keep": [{}]}, {"keep": [10**400]}],
)  # fmt: skip
def test_a_broken_record_is_refused(record):
    with refuses(DamagedError):
        Policy.from_json(record)
