import numpy as np

from learn_builders import LAYOUT, allocations, curves_of, truth


def test_damages_are_read_off_the_curve_of_each_site():
    curves, kept = curves_of(truth()), allocations(20, 0.4, 0)
    damages = curves.damages(kept)
    for index, units in enumerate(LAYOUT.units):
        curve = curves.site(index)
        assert len(curve) == units + 1
        np.testing.assert_array_equal(damages[:, index], curve[kept[:, index]])


def test_the_dense_model_has_no_damage_and_an_empty_one_the_most():
    of = truth()
    curves = curves_of(of)
    assert not curves.damages(LAYOUT.units).any()
    np.testing.assert_allclose(curves.damages(0 * LAYOUT.units), of.weights)


def test_any_batch_shape_will_do():
    curves, kept = curves_of(truth()), allocations(6, 0.3, 1)
    rows = curves.damages(kept)
    np.testing.assert_array_equal(curves.damages(kept[2]), rows[2])
    np.testing.assert_array_equal(curves.damages(kept.reshape(2, 3, -1)), rows.reshape(2, 3, -1))
    assert curves.damages(kept[:0]).shape == (0, len(LAYOUT.sites))
