import numpy as np
import torch

from learn_builders import DENSE_LOG_PPL, LAYOUT, allocations, fitted, spread, truth
from ppf.learn import fit_predictor as module
from ppf.learn.metrics import figures
from ppf.learn.process import NOISE


def test_the_network_learns(monkeypatch):
    monkeypatch.setattr(module, "_CNN_STEPS", 300)
    of = truth(2, strength=0.0)
    predictor, unseen = fitted("cnn", of, 60), spread(of, 40, 2, "heldout")
    found = figures(predictor, unseen, LAYOUT, DENSE_LOG_PPL)
    damage = np.array([one.kl for one in unseen])
    assert found.mae_damage < np.abs(damage - np.median(damage)).mean() / 4
    assert min(found.tau_within.values()) > 0.7 and found.tau > 0.85
    assert 0.4 < found.z < 2


def test_the_network_answers_as_its_training_twin_does(short):
    kept = allocations(30, 0.4, 0)
    estimator = fitted("cnn", truth()).estimator
    matrices = torch.from_numpy(np.clip(kept[..., None] / LAYOUT.units[:, None] * 8 - np.arange(8), 0, 1)).float() - 0.5
    columns = torch.nn.functional.unfold(matrices[:, None], 3, padding=1, stride=(1, 2)).transpose(1, 2)
    members = []
    for index in range(len(estimator.last)):
        twin = module._Network(columns.shape[1], torch.Generator())
        names = [name for name, _ in twin.named_parameters()]
        twin.load_state_dict({name: torch.from_numpy(np.asarray(getattr(estimator, name)[index])) for name in names})
        members.append(twin(columns).detach().numpy())
    mean, std, error = estimator.scale
    answers = np.array(members) * std + mean
    total = np.exp(answers.mean(0))
    damage, spread_of = estimator.estimate(kept)
    np.testing.assert_allclose(damage, np.maximum(total - NOISE, 0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(spread_of, total * np.sqrt(answers.var(0) + error**2), rtol=1e-4)


def test_the_members_of_the_ensemble_differ(short):
    estimator = fitted("cnn", truth()).estimator
    assert len(estimator.last) == 3
    for name in ("kernel", "hidden", "last"):
        parameters = getattr(estimator, name)
        assert (parameters[0] != parameters[1]).mean() > 0.9 and (parameters[1] != parameters[2]).mean() > 0.9
