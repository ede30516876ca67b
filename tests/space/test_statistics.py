from dataclasses import fields

import numpy as np
import pytest

from builders import importance, layout, refuses
from ppf.artifact import save_artifact
from ppf.errors import DamagedError, InputError
from ppf.space.statistics import Statistics

PER_SITE = ("outliers", "alpha", "influence", "spread")


def parts(of, seed=0):
    """What a record is made of, at random."""
    rng = np.random.default_rng(seed)
    vectors = {name: rng.random(len(of.sites)) for name in PER_SITE}
    return {**vectors, "variance": tuple(rng.random(units).astype(np.float32) for units in of.units)}


def tensors(of):
    """The same as an artefact holds it."""
    made = parts(of)
    variance = made.pop("variance")
    return {**made, **{f"variance.{index:04d}": site for index, site in enumerate(variance)}}


def bits(of):
    """All numbers of a record, to the bit."""
    arrays = [getattr(of, name) for name in PER_SITE] + list(of.variance)
    return [(array.dtype, array.shape, array.tobytes()) for array in arrays]


def test_what_is_saved_reloads_bit_equal(tmp_path):
    of = layout(layers=6)
    saved = Statistics(**parts(of))
    saved.save(tmp_path / "statistics.safetensors", of)
    assert bits(Statistics.load(tmp_path / "statistics.safetensors", of)) == bits(saved)


def test_sites_reload_in_their_order(tmp_path):
    of = layout(layers=11)
    variance = tuple(np.full(units, float(index)) for index, units in enumerate(of.units))
    Statistics(**{**parts(of), "variance": variance}).save(tmp_path / "x", of)
    assert [site[0] for site in Statistics.load(tmp_path / "x", of).variance] == list(range(22))


def test_statistics_own_read_only_numbers():
    of = layout()
    given = {name: [value.copy() for value in part] if name == "variance" else part for name, part in parts(of).items()}
    made = Statistics(**given)
    before = bits(made)
    for name in PER_SITE:
        given[name][:] = -9
        with pytest.raises(ValueError, match="read-only"):
            getattr(made, name)[0] = 1
    given["variance"][0][:] = -9
    with pytest.raises(ValueError, match="read-only"):
        made.variance[0][0] = 1
    assert bits(made) == before and {field.name for field in fields(made)} == {*PER_SITE, "variance"}


@pytest.mark.parametrize("name", PER_SITE)
@pytest.mark.parametrize("wrong", [[np.nan, 1, 1, 1], [1, 1, np.inf, 1], [1, 1, 1], [1] * 5, [[1, 1, 1, 1]], 3.0])
def test_what_is_not_one_finite_number_a_site_is_refused(name, wrong):
    with refuses(InputError) as caught:
        Statistics(**{**parts(layout()), name: np.array(wrong)})
    assert name in str(caught.value)


@pytest.mark.parametrize("wrong", [[np.nan, 1], [np.inf, 1], [[1, 2]], 3.0])
def test_what_is_not_one_finite_number_a_unit_is_refused(wrong):
    made = parts(layout())
    with refuses(InputError):
        Statistics(**{**made, "variance": (np.array(wrong), *made["variance"][1:])})


def test_the_statistics_of_another_model_and_another_kind_are_refused(tmp_path):
    of = layout()
    Statistics(**parts(of)).save(tmp_path / "statistics", of)
    importance(of).save(tmp_path / "importance", of)
    for file, other in (("statistics", layout(ffn=173)), ("importance", of)):
        with refuses(DamagedError):
            Statistics.load(tmp_path / file, other)


@pytest.mark.parametrize("name", [*PER_SITE, "variance.0000", "variance.0003"])
@pytest.mark.parametrize("instead", [None, np.zeros(3), np.zeros((4, 1))])
def test_other_numbers_under_the_right_fingerprint_are_refused(tmp_path, name, instead):
    of = layout()
    arrays = {key: value for key, value in {**tensors(of), name: instead}.items() if value is not None}
    save_artifact(tmp_path / "x", "statistics", of.fingerprint, arrays)
    with refuses(DamagedError):
        Statistics.load(tmp_path / "x", of)


def test_a_number_that_no_record_has_is_refused(tmp_path):
    of = layout()
    save_artifact(tmp_path / "x", "statistics", of.fingerprint, {**tensors(of), "extra": np.zeros(4)})
    with refuses(DamagedError):
        Statistics.load(tmp_path / "x", of)
