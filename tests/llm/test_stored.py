import pytest
import torch

import tiny_models as tiny
from builders import refuses
from ppf.errors import UnsupportedError
from ppf.llm.load import load_model, open_checkpoint
from ppf.llm.placement import convert
from ppf.llm.stored import outlined, running_stored, stored
from ppf.llm.weights import places_of


@pytest.mark.parametrize("name", tiny.TINY)
def test_every_tensor_is_that_of_the_loaded_model(tmp_path, name):
    tiny.save(tmp_path, name)
    source, model = open_checkpoint(str(tmp_path)), load_model(str(tmp_path)).model
    weights = stored(tmp_path, source.shell)
    assert weights.dtype == model.dtype
    tied = set(model.all_tied_weights_keys or {})
    assert set(weights.parts) >= set(model.state_dict()) >= tied
    for path, tensor in model.state_dict().items():
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


@pytest.mark.parametrize("name", tiny.TINY)
def test_it_answers_in_float32_whatever_its_files_hold(tmp_path, name):
    tiny.save(tmp_path, name, dtype=torch.bfloat16)
    source, model = open_checkpoint(str(tmp_path)), load_model(str(tmp_path)).model
    ids = torch.from_numpy(tiny.blocks(2, 9))
    with torch.inference_mode(), running_stored(source.shell, stored(tmp_path, source.shell).__getitem__):
        found = source.shell(input_ids=ids, use_cache=False).logits
    expected = tiny.logits(convert(model, torch.device("cpu"), torch.float32), ids.numpy())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


class Elsewhere(torch.Tensor):
    """A tensor on a device that is not here: it can be moved, and its rows be taken, but nothing on the CPU computes with it."""

    @classmethod
    def __torch_function__(cls, kind, types, args=(), kwargs=None):
        found = super().__torch_function__(kind, types, args, kwargs)
        if kind is torch.Tensor.to and "cpu" in args[1:]:
            return found.as_subclass(torch.Tensor)
        if isinstance(found, torch.Tensor) and kind not in (torch.Tensor.__getitem__, torch.Tensor.float, torch.Tensor.to):
            raise RuntimeError("tensors on two devices")
        return found


@pytest.mark.parametrize("name", tiny.TINY)
def test_weights_may_lie_on_another_device(tmp_path, name):
    tiny.save(tmp_path, name)
    source, model, ids = open_checkpoint(str(tmp_path)), load_model(str(tmp_path)).model, torch.from_numpy(tiny.blocks(2, 9))
    weights = {path: weight.detach().as_subclass(Elsewhere) for path, weight in model.named_parameters(remove_duplicate=False)}
    with torch.inference_mode(), running_stored(source.shell, weights.__getitem__):
        found = source.shell(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, model(input_ids=ids, use_cache=False).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", tiny.TINY)
def test_of_an_outline_vectors_are_there_and_matrices_are_shapes(tmp_path, name):
    tiny.save(tmp_path, name, dtype=torch.bfloat16)
    source, model = open_checkpoint(str(tmp_path)), load_model(str(tmp_path)).model
    outline = outlined(source.shell, stored(tmp_path, source.shell))
    own, theirs = (dict(one.named_parameters()) for one in (outline, model))
    assert set(own) == set(theirs)
    for path, tensor in theirs.items():
        assert own[path].shape == tensor.shape and own[path].dtype == tensor.dtype and own[path].is_meta == (tensor.ndim > 1)
        assert own[path].is_meta or torch.equal(own[path], tensor)
    for path, buffer in model.named_buffers():
        torch.testing.assert_close(outline.get_buffer(path), buffer, rtol=0, atol=0)


def test_experts_in_an_unknown_form_are_refused(tmp_path):
    tiny.save(tmp_path, "mixtral-gqa")
    source = open_checkpoint(str(tmp_path))
    source.shell.config.model_type = "mixtral of tomorrow"
    with refuses(UnsupportedError):
        places_of(tmp_path, source.shell)
