import numpy as np

from learn_builders import LAYOUT, allocations, curves_of, truth
from ppf.learn.objective import CAUTION, predicted
from ppf.learn.predictor import Additive, Predictor


def test_an_objective_is_the_predicted_damage_and_a_share_of_its_doubt():
    curves = curves_of(truth())
    predictor = Predictor(Additive(curves.units, curves.table, np.array(0.3)), np.array([[0.0, 1.0], [0.0, 1.0]]), np.zeros(()))
    kept = allocations(10, 0.4, 0)
    prediction = predictor.predict(kept)
    np.testing.assert_array_equal(predicted(predictor, 0.0)(kept), prediction.damage)
    np.testing.assert_allclose(predicted(predictor, 2.0)(kept), prediction.damage + 2 * prediction.std)
    np.testing.assert_array_equal(predicted(predictor)(kept), predicted(predictor, CAUTION)(kept))
    assert (predicted(predictor)(kept) > prediction.damage).all()
    assert predicted(predictor)(LAYOUT.units[None])[0] < predicted(predictor)(kept).min()
