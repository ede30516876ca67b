from types import SimpleNamespace

import torch

import tiny_models
from ppf.config import FitConfig
from ppf.llm.engines.bench import InProcessEngine
from ppf.llm.load import load_model
from ppf.progress import Progress
from ppf.recipes.lab import Lab


def test_while_others_measure_it_holds_no_converted_weights_and_has_them_again_when_asked(tmp_path):
    loaded = load_model(str(tiny_models.save(tmp_path / "model", "llama-mha", dtype=torch.bfloat16)))
    stored = tiny_models.snapshot(loaded.model)
    lab = Lab(loaded, FitConfig(loaded.name, str(tmp_path / "study"), device="cpu"), Progress(True))
    converted = tiny_models.snapshot(lab.model)
    assert lab.model.dtype == torch.float32
    lab._rest()
    assert tiny_models.snapshot(loaded.model) == stored
    assert lab.model is loaded.model and tiny_models.snapshot(lab.model) == converted


def test_it_rests_again_when_others_measure_after_something_asked_for_the_model(tmp_path):
    loaded = load_model(str(tiny_models.save(tmp_path / "model", "llama-mha", dtype=torch.bfloat16)))
    lab = Lab(loaded, FitConfig(loaded.name, str(tmp_path / "study"), device="cpu"), Progress(True))
    lab._engine = SimpleNamespace(measure=lambda masks, part, rows: [(0, "measured")])
    assert lab.model.dtype == torch.float32
    assert lab.answers([None], "test") == ["measured"]
    assert loaded.model.dtype == torch.bfloat16
    lab._engine = InProcessEngine.__new__(InProcessEngine)
    assert lab.model is loaded.model and lab._measuring() is lab._engine and loaded.model.dtype == torch.float32


def test_a_model_that_was_spread_is_let_go_while_others_measure(tmp_path):
    loaded = load_model(str(tiny_models.save(tmp_path / "model", "llama-mha")))
    lab = Lab(loaded, FitConfig(loaded.name, str(tmp_path / "study"), device="cpu"), Progress(True))
    loaded.spread["somewhere", torch.float32] = loaded.model
    lab._rest()
    assert not loaded.spread


def test_a_copy_that_measures_in_less_than_the_checkpoint_is_let_go(tmp_path):
    loaded = load_model(str(tiny_models.save(tmp_path / "model", "llama-mha")))
    lab = Lab(loaded, FitConfig(loaded.name, str(tmp_path / "study"), device="cpu", dtype="bfloat16"), Progress(True))
    first = lab.model
    assert lab.model is first is not loaded.model
    lab._rest()
    assert lab.model is not first and lab.model.dtype == torch.bfloat16 and loaded.model.dtype == torch.float32
