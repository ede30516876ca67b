import copy
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

import tiny_models as tiny
from builders import random_mask, refuses
from ppf.errors import InputError, ResourceError
from ppf.llm import recover as module
from ppf.llm.architectures import layout_of_model
from ppf.llm.compensation import reader_means
from ppf.llm.recover import Training, adapted, batches, recover, usual_lr
from ppf.llm.surgery import cut

HOW = Training(rank=4, lr=1e-2, steps=30, sequences=4, at_once=4, dtype=torch.float32, seed=0)
FULL = replace(HOW, rank=None, lr=3e-3)
BLOCKS = tiny.blocks(16, 12, seed=1)


def pair(name="llama-gqa-tied", seed=3):
    """A dense model and a cut one."""
    dense = tiny.model(name)
    layout = layout_of_model(dense)
    return dense, cut(dense, layout, random_mask(layout, seed))


def run(model, teacher=None, how=HOW, blocks=BLOCKS):
    losses = []
    trained = recover(model, layout_of_model(model), blocks, teacher, how, lambda note: losses.append(float(note.split()[1])))
    return trained, losses


def divergence(dense, model, ids):
    theirs, ours = (tiny.logits(one, ids)[:, :-1].log_softmax(-1) for one in (dense, model))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean().item()


def linears(layout):
    """The modules that a layout names."""
    return {rows.module for site in layout.sites for rows in site.writers} | {site.reader for site in layout.sites}


def states(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# --- adapters ---


@pytest.mark.parametrize("name", tiny.TINY)
def test_merged_adapters_answer_as_they_did_beside_the_weights(name):
    dense, model = pair(name)
    layout, before, answers = layout_of_model(model), states(model), tiny.logits(model, BLOCKS)
    adapters = adapted(model, layout, 4, seed=0)
    assert torch.equal(tiny.logits(adapters, BLOCKS), answers)  # they have learned nothing yet
    trained = {path for path, parameter in adapters.named_parameters() if parameter.requires_grad}
    assert {path.split(".lora_")[0].removeprefix("model.") for path in trained} == linears(layout)
    with torch.no_grad():
        for path, parameter in adapters.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    beside = tiny.logits(adapters, BLOCKS)
    assert (beside - answers).abs().max() > 0.1
    merged = adapters.merge_and_unload()
    torch.testing.assert_close(tiny.logits(merged, BLOCKS), beside, rtol=1e-4, atol=1e-4)
    assert type(merged) is type(model) and layout_of_model(merged) == layout  # plain linear layers of the same widths
    assert {key: tensor.shape for key, tensor in merged.state_dict().items()} == {key: one.shape for key, one in before.items()}


def test_biases_of_a_compensated_model_stay_where_they_are():
    dense = tiny.model("llama-mha")
    layout = layout_of_model(dense)
    model = cut(dense, layout, random_mask(layout), reader_means(dense, layout, BLOCKS))
    before = states(model)
    after = run(model, dense)[0].state_dict()
    changed = {name.rpartition(".")[2] for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed == {"weight"}


def test_only_the_layers_of_the_layout_change():
    dense, model = pair()
    before = states(model)
    after = run(model, dense)[0].state_dict()
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{path}.weight" for path in linears(layout_of_model(model))
    }


def test_without_the_package_adapters_are_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with refuses(ResourceError) as caught:
        module.check_adapters()
    assert "ppf[recover]" in str(caught.value) and "--full" in str(caught.value)
    dense, model = pair()
    run(model, dense, replace(FULL, steps=1))  # needs none


# --- training ---


@pytest.mark.parametrize("how", [HOW, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("name", ["llama-gqa-tied", "mistral-gqa", "qwen2-gqa", "qwen3-gqa"])
def test_it_comes_nearer_to_the_teacher_on_text_it_did_not_read(name, how):
    dense, model = pair(name)
    kept, text = tiny.snapshot(dense), tiny.blocks(16, 12, seed=9)
    before = divergence(dense, model, text)
    trained, losses = run(model, dense, how)
    assert divergence(dense, trained, text) < 0.9 * before
    assert losses[0] == pytest.approx(divergence(dense, pair(name)[1], BLOCKS[next(batches(16, how))]), rel=1e-3)
    assert len(losses) == how.steps and tiny.snapshot(dense) == kept
    assert not trained.training and not any(parameter.requires_grad for parameter in trained.parameters())


@pytest.mark.parametrize("how", [HOW, FULL], ids=["lora", "full"])
def test_without_a_teacher_it_learns_the_text(how):
    text = np.tile(np.arange(3, 15), (16, 1))
    model = pair()[1]
    before = functional.cross_entropy(tiny.logits(model, text)[0, :-1], torch.from_numpy(text[0, 1:])).item()
    trained, losses = run(model, None, how, text)
    after = functional.cross_entropy(tiny.logits(trained, text)[0, :-1], torch.from_numpy(text[0, 1:])).item()
    assert losses[0] == pytest.approx(before, rel=1e-3) and after < 0.5 * before


@pytest.mark.parametrize("how", [HOW, FULL], ids=["lora", "full"])
def test_the_seed_is_all_the_chance_there_is(how):
    dense, model = pair()
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, second, other = (run(copy.deepcopy(model), dense, replace(how, steps=3, seed=seed))[0] for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert not torch.equal(tiny.logits(first, BLOCKS), tiny.logits(other, BLOCKS))


def test_what_goes_through_at_once_changes_nothing():
    dense, model = pair()
    found = [run(copy.deepcopy(model), dense, replace(FULL, steps=2, at_once=size)) for size in (1, 3, 4)]
    for trained, losses in found[1:]:
        assert losses == pytest.approx(found[0][1], rel=1e-3)
        torch.testing.assert_close(tiny.logits(trained, BLOCKS), tiny.logits(found[0][0], BLOCKS), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("how", [HOW, FULL], ids=["lora", "full"])
def test_computing_in_bfloat16_updates_float32(how):
    dense, model = pair()
    before = divergence(dense, model, BLOCKS)
    trained, _ = run(model, dense, replace(how, dtype=torch.bfloat16))
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert divergence(dense, trained, BLOCKS) < 0.9 * before


def test_adapters_beside_small_weights_learn_in_float32():
    dense, model = pair()
    before, small = divergence(dense, model, BLOCKS), model.bfloat16()
    adapters = adapted(copy.deepcopy(small), layout_of_model(small), 4, 0)
    assert {one.dtype for one in adapters.parameters() if one.requires_grad} == {torch.float32}
    trained, _ = run(small, dense, replace(HOW, dtype=torch.bfloat16))
    assert trained.dtype == torch.bfloat16 and divergence(dense, trained.float(), BLOCKS) < 0.9 * before


@pytest.mark.parametrize("how", [HOW, FULL], ids=["lora", "full"])
def test_a_loss_that_is_no_number_ends_it_with_the_step(how):
    dense, model = pair()
    with refuses(InputError) as caught:
        run(model, dense, replace(how, lr=1e30))
    assert "of 30" in str(caught.value) and "--lr" in str(caught.value)


# --- the plan of a training ---


def test_every_block_is_read_once_before_one_is_read_again():
    how = replace(HOW, steps=12, sequences=5)
    rows = np.concatenate(list(batches(20, how)))
    assert len(rows) == 60
    for epoch in rows.reshape(3, 20):
        assert sorted(epoch) == list(range(20))
    assert not np.array_equal(rows[:20], rows[20:40])
    assert [len(taken) for taken in batches(2, replace(HOW, steps=2, sequences=7))] == [7, 7]  # a short text


@pytest.mark.parametrize("steps", [1, 2, 19, 20, 200, 1000])
def test_the_learning_rate_rises_and_falls(steps):
    how = replace(HOW, steps=steps)
    scale = [how.scale(step) for step in range(steps)]
    top = int(np.argmax(scale))
    assert all(0 < value <= 1 for value in scale) and max(scale) > 0.85
    assert scale[: top + 1] == sorted(scale[: top + 1]) and scale[top:] == sorted(scale[top:], reverse=True)
    assert top <= math.ceil(module.WARM_UP * steps) and (steps < 20 or scale[-1] < 0.01)


def test_wider_models_learn_more_slowly():
    for rank in (None, 16):
        assert usual_lr(320, rank) == pytest.approx(usual_lr(160, rank) / 2)
    assert usual_lr(4096, None) < usual_lr(4096, 16) < 1e-3


def test_gradients_are_clipped(monkeypatch):
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def watched(weights, most):
        norm = clip(weights, most)
        norms.append(torch.stack([weight.grad.norm() for weight in weights]).norm().item())
        return norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched)
    dense, model = pair()
    run(model, dense, replace(FULL, steps=3))
    assert len(norms) == 3 and max(norms) <= module.CLIP + 1e-4
