import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import examples, importance, layout, refuses
from ppf.artifact import save_artifact
from ppf.errors import DamagedError, InputError
from ppf.space.importance import Importance, check_units


@examples(50)
@given(st.lists(st.floats(-(2.0**99), 2.0**99, width=32) | st.integers(-2, 2), min_size=1, max_size=30))
def test_order_is_a_permutation_from_high_to_low_with_ties_in_place(scores):
    (order,) = Importance((np.array(scores),), "x", "y").order
    assert sorted(order) == list(range(len(scores)))
    single = np.float32(scores)
    assert [(-single[unit], unit) for unit in order] == sorted((-score, unit) for unit, score in enumerate(single))


def test_importance_owns_read_only_numbers():
    scores = [np.array([3.0, 1, 2]), np.array([5, 6])]
    of = Importance(tuple(scores), "x", "y")
    scores[0][0] = -9
    assert of.scores[0].tolist() == [3, 1, 2] and of.scores[1].dtype == np.float32
    with pytest.raises(ValueError, match="read-only"):
        of.scores[0][0] = 1


def test_the_order_is_read_only():
    with pytest.raises(ValueError, match="read-only"):
        importance(layout()).order[0][0] = 1


@pytest.mark.parametrize("scores", [[np.nan, 1], [np.inf, 1], [[1, 2]], 3.0])
def test_what_is_not_one_finite_number_a_unit_is_refused(scores):
    with refuses(InputError):
        Importance((np.array(scores),), "x", "y")


def test_what_is_saved_reloads_bit_equal(tmp_path):
    of = layout(layers=6)
    saved = importance(of)
    saved.save(tmp_path / "importance.safetensors", of)
    loaded = Importance.load(tmp_path / "importance.safetensors", of)
    assert [score.tobytes() for score in loaded.scores] == [score.tobytes() for score in saved.scores]
    assert (loaded.method, loaded.source) == (saved.method, saved.source)


def test_the_importance_of_another_model_is_refused(tmp_path):
    importance(layout()).save(tmp_path / "x", layout())
    with refuses(DamagedError):
        Importance.load(tmp_path / "x", layout(ffn=173))


@pytest.mark.parametrize("scores", [[2, 172, 2, 171], [2, 172], []])
def test_other_units_under_the_right_fingerprint_are_refused(tmp_path, scores):
    arrays = {f"{index:04d}": np.zeros(count, np.float32) for index, count in enumerate(scores)}
    save_artifact(tmp_path / "x", "importance", layout().fingerprint, arrays, method="x", source="y")
    with refuses(DamagedError):
        Importance.load(tmp_path / "x", layout())


def test_units_must_be_those_of_the_model():
    check_units([np.zeros(2), np.zeros(3)], np.array([2, 3]), "scores")
    for units in ([3, 2], [2], [2, 3, 1]):
        with refuses(DamagedError):
            check_units([np.zeros(2), np.zeros(3)], units, "scores")
