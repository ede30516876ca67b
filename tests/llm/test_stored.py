import pytest
import torch

import tiny_models as tiny
from builders import refuses
from ppf.errors import UnsupportedError
from ppf.llm.load import load_model, open_checkpoint
from ppf.llm.stored import running_stored, stored
from ppf.llm.weights import places_of


@pytest.mark.parametrize("name", tiny.TINY)
def test_every_tensor_is_that_of_the_loaded_model(tmp_path, name):
    tiny.save(tmp_path, name)
    source, model = open_checkpoint(str(tmp_path)), load_model(str(tmp_path)).model
    weights = stored(tmp_path, source.shell)
    assert weights.dtype == model.dtype
    tied = set(model.all_tied_weights_keys or {})
    assert set(weights.parts) | tied >= set(model.state_dict())
    for path, tensor in model.state_dict().items():
        if path in weights.parts:
            assert torch.equal(weights[path], tensor), path


@pytest.mark.parametrize("name", tiny.TINY)
def test_a_model_runs_without_its_weights_in_memory(tmp_path, name):
    tiny.save(tmp_path, name)
    source, model, ids = open_checkpoint(str(tmp_path)), load_model(str(tmp_path)).model, torch.from_numpy(tiny.blocks(2, 9))
    weights = stored(tmp_path, source.shell)
    held = []
    with torch.inference_mode(), running_stored(source.shell, lambda path: held.append(path) or weights[path]):
        found = source.shell.base_model(input_ids=ids, use_cache=False).last_hidden_state
        own = {parameter.untyped_storage().nbytes() for parameter in source.shell.parameters()}
        expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert own == {4} and len(set(held)) >= len(source.layout.sites)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in source.shell.modules())


def test_experts_in_an_unknown_form_are_refused(tmp_path):
    tiny.save(tmp_path, "mixtral-gqa")
    source = open_checkpoint(str(tmp_path))
    source.shell.config.model_type = "mixtral of tomorrow"
    with refuses(UnsupportedError):
        places_of(tmp_path, source.shell)
