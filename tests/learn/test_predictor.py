from dataclasses import fields, is_dataclass, replace

import numpy as np
import pytest

from builders import layout, refuses
from learn_builders import DENSE_LOG_PPL, LAYOUT, allocations, curves_of, leant, probes, spread, truth
from ppf.artifact import load_artifact, save_artifact
from ppf.errors import DamagedError
from ppf.learn import fit_predictor as module
from ppf.learn.fit_predictor import fit_predictor
from ppf.learn.predictor import ESTIMATORS, LEAN_NOISE, Additive, Corrected, Predictor, patches
from ppf.learn.process import NOISE, Points, Process

KEPT = np.concatenate([allocations(20, ratio, 9) for ratio in (0.1, 0.4, 0.7)])
FIELDS = ("damage", "std", "log_ppl", "log_ppl_std")


@pytest.fixture(scope="module", params=sorted(ESTIMATORS))
def predictor(request):
    """One of each kind; the network hardly trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CNN_STEPS", 20)
        samples = leant(probes(truth()) + spread(truth(), 20))
        return fit_predictor(request.param, samples, [], LAYOUT, DENSE_LOG_PPL, 0)


def same(one, other):
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


# --- predicting ---


def test_a_batch_is_its_rows(predictor):
    batch = predictor.predict(KEPT)
    rows = [predictor.predict(row[None]) for row in KEPT]
    for name in FIELDS:
        np.testing.assert_allclose(getattr(batch, name), [getattr(row, name)[0] for row in rows], rtol=1e-5, atol=1e-7)


def test_a_batch_of_any_size_will_do(predictor):
    order = np.random.default_rng(0).integers(0, len(KEPT), 2500)
    small, large = predictor.predict(KEPT), predictor.predict(KEPT[order])
    np.testing.assert_allclose(large.damage, small.damage[order], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(large.std, small.std[order], rtol=1e-5, atol=1e-7)


def test_an_empty_batch_is_empty(predictor):
    prediction = predictor.predict(KEPT[:0])
    assert {getattr(prediction, name).shape for name in FIELDS} == {(0,)}


def test_predictions_are_possible_and_what_is_given_stays_as_it_is(predictor):
    kept = KEPT.copy()
    prediction = predictor.predict(kept)
    assert (prediction.damage >= 0).all() and (prediction.std > 0).all() and (prediction.log_ppl >= 0).all()
    assert (prediction.log_ppl_std > 0).all()
    np.testing.assert_array_equal(kept, KEPT)


def test_the_sum_is_the_sum_of_the_curves():
    curves = curves_of(truth())
    damage, std = Additive(curves.units, curves.table, np.array(0.25)).estimate(KEPT)
    expected = [sum(curves.site(site)[count] for site, count in enumerate(row)) for row in KEPT]
    np.testing.assert_allclose(damage, expected)
    np.testing.assert_allclose(std, 0.25 * (damage + 0.01))


def test_what_the_processes_say_is_an_exponent_that_is_held_within_bounds():
    curves, points = curves_of(truth()), Points.of(KEPT, curves_of(truth()))

    def saying(mean):
        """A process whose mean is the same everywhere."""
        hyper = np.array((0.1, 0.5, 1.0, 0.1, 0.0, 0.0, 0.02, 0.01, mean))
        seen = Points.of(KEPT[:1], curves)
        return Process(seen.directions, seen.sizes, seen.gone, np.ones(len(curves.units)), hyper, np.zeros(1), np.ones((1, 1)))

    total = curves.damages(KEPT).sum(axis=1) + NOISE
    for mean, held, lean in ((0.4, 0.4, 0.4), (-2.0, -2.0, -1.0), (9.0, 5.0, 1.0), (-9.0, -5.0, -1.0)):
        estimator = Corrected(curves.units, curves.table, saying(mean), saying(mean))
        damage, std = estimator.estimate(KEPT)
        np.testing.assert_allclose(damage, np.maximum(total * np.exp(held) - NOISE, 0))
        np.testing.assert_allclose(std, total * np.exp(held) * saying(mean).mean_and_std(points)[1])
        np.testing.assert_array_equal(estimator.lean(KEPT), lean)


def test_patches_are_the_neighbourhood_of_every_second_place():
    image = np.arange(2 * 3 * 4.0).reshape(2, 3, 4) + 1
    found = patches(image).reshape(2, 3, 2, 3, 3)
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    for n, row, column in np.ndindex(2, 3, 2):
        np.testing.assert_array_equal(found[n, row, column], padded[n, row : row + 3, 2 * column : 2 * column + 3])


# --- the link ---


def test_the_link_is_read_between_its_knots_and_goes_on_straight_beyond():
    link = np.array([[0.0, 1.0, 3.0], [0.0, 2.0, 3.0]])
    predictor = Predictor(Additive(curves_of(truth()).units, curves_of(truth()).table, np.array(0.1)), link, np.zeros(()))
    np.testing.assert_allclose(predictor.log_ppl_of(np.array([0, 0.5, 1, 2, 3, 5, 103])), [0, 1, 2, 2.5, 3, 4, 53])


def test_more_damage_never_means_a_lower_log_perplexity(predictor):
    rises = predictor.log_ppl_of(np.linspace(0, 50, 1000))
    assert rises[0] == 0 and (np.diff(rises) >= 0).all() and rises[-1] > rises[500] > 0


def test_more_damage_of_one_allocation_never_means_a_lower_log_perplexity(predictor):
    damages = np.linspace(0, 50, 300)
    for kept in KEPT[::10]:
        rises = predictor.leant(np.tile(kept, (300, 1)), damages)
        assert (np.diff(rises) >= 0).all() and rises[-1] > rises[150] > 0


def test_only_the_corrected_one_leans_off_the_link(predictor):
    damage = np.linspace(0.5, 5, len(KEPT))
    lean, found, link = predictor.estimator.lean(KEPT), predictor.leant(KEPT, damage), predictor.log_ppl_of(damage)
    assert lean.shape == (len(KEPT),) and lean.any() == (predictor.kind == "corrected")
    np.testing.assert_allclose(np.log((found + LEAN_NOISE) / (link + LEAN_NOISE)), lean, atol=1e-12)


def test_the_doubt_about_log_perplexity_is_that_of_the_damage_and_of_the_link():
    curves = curves_of(truth())
    link = np.array([[0.0, 1.0, 3.0], [0.0, 2.0, 3.0]])
    predictor = Predictor(Additive(curves.units, curves.table, np.array(0.02)), link, np.array(0.3))
    found = predictor.predict(KEPT)
    slope = np.where(found.damage < 1, 2.0, 0.5)
    away = (np.abs(found.damage - 1) > found.std) & (found.damage > found.std)  # the slope is one on both sides
    expected = np.sqrt((slope * found.std) ** 2 + (0.3 * (found.log_ppl + LEAN_NOISE)) ** 2)
    assert away.sum() > 40
    np.testing.assert_allclose(found.log_ppl_std[away], expected[away])


# --- files ---


def test_what_is_saved_predicts_the_same(predictor, tmp_path):
    predictor.save(tmp_path / "p", LAYOUT)
    loaded = Predictor.load(tmp_path / "p", LAYOUT)
    assert loaded.kind == predictor.kind
    same(loaded.predict(KEPT), predictor.predict(KEPT))
    np.testing.assert_array_equal(loaded.estimator.lean(KEPT), predictor.estimator.lean(KEPT))
    predictor.save(tmp_path / "q", LAYOUT)
    assert (tmp_path / "q").read_bytes() == (tmp_path / "p").read_bytes()


def arrays_of(record):
    """All arrays of a dataclass, those of its parts included."""
    parts = [(field.name, getattr(record, field.name)) for field in fields(record)]
    nested = [(f"{name} {inner}", array) for name, part in parts if is_dataclass(part) for inner, array in arrays_of(part)]
    return [(name, part) for name, part in parts if not is_dataclass(part)] + nested


def test_every_array_comes_back_as_it_was(predictor, tmp_path):
    predictor.save(tmp_path / "p", LAYOUT)
    loaded = Predictor.load(tmp_path / "p", LAYOUT)
    before, after = arrays_of(predictor), arrays_of(loaded)
    assert [name for name, _ in after] == [name for name, _ in before]
    assert ("estimator leaning weights" in dict(before)) == (predictor.kind == "corrected")
    for (_, one), (_, other) in zip(before, after, strict=True):
        assert np.asarray(other).dtype == np.asarray(one).dtype
        np.testing.assert_array_equal(other, one, strict=True)


def test_a_predictor_that_has_predicted_saves_no_more_than_its_arrays(predictor, tmp_path):
    replace(predictor).save(tmp_path / "before", LAYOUT)
    predictor.predict(KEPT)
    predictor.save(tmp_path / "after", LAYOUT)
    assert (tmp_path / "after").read_bytes() == (tmp_path / "before").read_bytes()


def test_a_predictor_of_another_model_is_refused(predictor, tmp_path):
    predictor.save(tmp_path / "p", LAYOUT)
    with refuses(DamagedError):
        Predictor.load(tmp_path / "p", layout(layers=4, heads=4, groups=4, ffn=49))


def test_a_damaged_file_is_refused(predictor, tmp_path):
    path = tmp_path / "p"
    predictor.save(path, LAYOUT)
    data = path.read_bytes()
    for damaged in (b"", data[:20], data[: len(data) // 2], data[:-1], data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]):
        path.write_bytes(damaged)
        with refuses(DamagedError):
            Predictor.load(path, LAYOUT)


@pytest.mark.parametrize("change", ["unknown", "none", "missing", "too many", "no link"])
def test_a_file_that_holds_no_known_predictor_is_refused(predictor, tmp_path, change):
    predictor.save(tmp_path / "p", LAYOUT)
    arrays, header = load_artifact(tmp_path / "p", "predictor")
    estimator = {"unknown": {"estimator": "oracle"}, "none": {}}.get(change, {"estimator": header["estimator"]})
    if change == "missing":
        del arrays["units"]
    if change == "too many":
        arrays["another"] = np.zeros(3)
    if change == "no link":
        del arrays["link"]
    save_artifact(tmp_path / "p", "predictor", LAYOUT.fingerprint, arrays, **estimator)
    with refuses(DamagedError):
        Predictor.load(tmp_path / "p", LAYOUT)


@pytest.mark.parametrize(
    "change",
    ["no part", "another part", "no correction", "no leaning", "a third process", "of before the second process"],
)
def test_a_file_whose_processes_are_not_whole_is_refused(change, tmp_path):
    predictor = fit_predictor("corrected", probes(truth()) + spread(truth(), 10), [], LAYOUT, DENSE_LOG_PPL, 0)
    predictor.save(tmp_path / "p", LAYOUT)
    arrays, header = load_artifact(tmp_path / "p", "predictor")
    if change == "no part":
        del arrays["leaning.inverse"]
    if change == "another part":
        arrays["correction.another"] = np.zeros(3)
    if change in ("no correction", "no leaning"):
        arrays = {name: array for name, array in arrays.items() if not name.startswith(change.removeprefix("no "))}
    if change == "a third process":
        arrays |= {f"more.{name.split('.')[1]}": array for name, array in arrays.items() if name.startswith("leaning.")}
    if change == "of before the second process":
        arrays = {name.removeprefix("correction."): array for name, array in arrays.items() if not name.startswith("leaning.")}
    save_artifact(tmp_path / "p", "predictor", LAYOUT.fingerprint, arrays, estimator=header["estimator"])
    with refuses(DamagedError):
        Predictor.load(tmp_path / "p", LAYOUT)
