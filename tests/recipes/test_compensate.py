import numpy as np
import pytest
import torch

import tiny_models
from builders import refuses
from ppf.config import Target
from ppf.decide import Decider
from ppf.errors import InputError
from ppf.llm.load import adopt_model, load_model
from ppf.llm.placement import Placement
from ppf.llm.text import Text
from ppf.progress import Progress
from ppf.recipes.compensate import added_params, compensated, with_room
from ppf.recipes.prune import prune

CPU = torch.device("cpu")


def tensors(model):
    return dict(model.state_dict())


@pytest.fixture(scope="module")
def pruned(fitted):
    """The same decision with each compensation."""
    return {method: fitted.prune(ratio=0.4, compensate=method, device="cpu") for method in ("none", "bias", "ridge")}


def test_none_is_the_default(fitted, pruned):
    plain, named = fitted.prune(ratio=0.4, device="cpu"), pruned["none"]
    assert plain.plan["compensation"] == {"method": "none"}
    assert all(torch.equal(tensor, tensors(named.model)[name]) for name, tensor in tensors(plain.model).items())


@pytest.mark.parametrize("method", ["bias", "ridge"])
def test_the_plan_says_what_was_done_and_what_the_prediction_knows(pruned, method):
    plan, plain = pruned[method].plan, pruned["none"].plan
    assert plan["compensation"]["method"] == method and plan["compensation"]["tokens"] == 128
    assert plan["predicted"] == plain["predicted"] and plan["predicted"]["compensation"] == "none"
    assert plan["mask"] == plain["mask"] and plan["measured"] != plain["measured"]
    assert plan["params"]["after"] == sum(parameter.numel() for parameter in pruned[method].model.parameters())


@pytest.mark.parametrize("method", ["bias", "ridge"])
def test_a_compensated_export_reloads(pruned, method, tmp_path):
    pruned[method].save_pretrained(tmp_path / "out")
    again = load_model(str(tmp_path / "out")).model
    ids = tiny_models.blocks(2)
    assert torch.equal(tiny_models.logits(again, ids), tiny_models.logits(pruned[method].model, ids))


def test_a_wished_size_holds_the_biases_too(fitted):
    layout = Decider(fitted.folder).layout
    asked = layout.total - layout.prunable // 3
    biased = fitted.prune(params=str(asked), compensate="bias", device="cpu")
    assert asked - layout.costs.min() < biased.plan["params"]["after"] <= asked


def test_room_is_made_in_the_wish_that_was_said():
    assert with_room(Target(ratio=0.3), 100, 2) == Target(ratio=0.3)
    assert with_room(Target(params="3K"), 100, 2) == Target(params="2900")
    assert with_room(Target(memory="3KB", align=2), 100, 2) == Target(memory="2800B", align=2)
    for small in (Target(params="100"), Target(memory="100B")):
        with refuses(InputError):
            with_room(small, 100, 2)


def test_the_weights_keep_the_dtype_of_the_checkpoint(fitted):
    decider = Decider(fitted.folder)
    loaded = adopt_model(tiny_models.model("llama-mha", dtype=torch.bfloat16), tiny_models.tokenizer())
    mask = decider.decide(Target(ratio=0.4)).mask
    blocks = Text.load(decider.study.path("text"), decider.layout.fingerprint).calibration
    for method in ("none", "bias", "ridge"):
        smaller, record = compensated(loaded, mask, blocks, method, Placement(CPU), torch.float32)
        assert {parameter.dtype for parameter in smaller.parameters()} == {torch.bfloat16} and record["method"] == method
    units = loaded.layout.units
    assert loaded.model.dtype == torch.bfloat16 and added_params(loaded, "ridge", units) == 0
    assert added_params(loaded, "bias", units) == 6 * 32 and added_params(loaded, "bias", units * [0, 1, 1, 1, 1, 1]) == 5 * 32


def test_a_compensation_that_does_not_exist_is_refused(fitted):
    with refuses(InputError):
        fitted.prune(ratio=0.4, compensate="prayer")


def test_the_same_twice_is_the_same(fitted):
    loaded = adopt_model(tiny_models.model("llama-mha"), tiny_models.tokenizer())
    one, two = (prune(fitted.folder, loaded, Target(ratio=0.4), "cpu", 0, Progress(True), "ridge") for _ in range(2))
    assert all(torch.equal(tensor, tensors(two.model)[name]) for name, tensor in tensors(one.model).items())
    assert np.isfinite(one.plan["measured"]["log_ppl"])
