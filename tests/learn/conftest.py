import pytest

from ppf.learn import fit_predictor


@pytest.fixture
def short(monkeypatch):
    """Networks that are hardly trained: enough where only their form counts."""
    monkeypatch.setattr(fit_predictor, "_CNN_STEPS", 20)
