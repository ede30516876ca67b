from math import lgamma, log

import numpy as np
import pytest
import torch
from torch import nn

import tiny_models as tiny
from builders import random_mask, refuses
from ppf.errors import InputError
from ppf.llm.architectures import ENTRANCES, EXITS, FAMILIES, ends_of, layout_of_model, linear, stack_of
from ppf.llm.scores import score_units
from ppf.llm.statistics import OUTLIER_FACTOR, layer_statistics
from ppf.llm.surgery import cut

BLOCKS = tiny.blocks(5, 12)
families = pytest.mark.parametrize("name", tiny.TINY)


def measured(model, blocks=BLOCKS):
    return layer_statistics(model, layout_of_model(model), blocks)


def projections(model, layer):
    """All linear modules of a decoder layer that units are removed from."""
    found = [module for module in stack_of(model)[layer].modules() if isinstance(module, nn.Linear)]
    return [module for module in found if module.out_features > 1]  # not the gate of an expert that all tokens see


def of_layer(model, found, layer):
    """The value of a statistic that all sites of a layer share."""
    values = {value for value, site in zip(found, layout_of_model(model).sites, strict=True) if site.layer == layer}
    assert len(values) == 1
    return values.pop()


def depth(model):
    return len(stack_of(model))


def heavy_tailed(name):
    """A model with outliers among its weights, more in later layers."""
    model = tiny.model(name)
    with torch.no_grad():
        for layer in range(depth(model)):
            for module in projections(model, layer):
                module.weight.copy_(module.weight.sign() * (module.weight.abs() / 0.15) ** (1.5 + layer) * 0.1)
    return model


def inputs(model, blocks):
    """Per linear module Float[T, C]: what it read of all tokens."""
    seen, handles = {}, []
    for module in [module for layer in range(depth(model)) for module in projections(model, layer)]:
        hook = lambda module, args: seen.update({module: args[0].reshape(-1, args[0].shape[-1]).double().numpy()})  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook))
    tiny.logits(model, blocks)
    for handle in handles:
        handle.remove()
    return seen


def causal(length, window):
    """Float[1, 1, L, L]: 0 where a token may look, else minus infinity."""
    mask = torch.full((1, 1, length, length), -torch.inf)
    for row in range(length):
        for column in range(row + 1):
            if window is None or row - column < window:
                mask[0, 0, row, column] = 0
    return mask


@torch.inference_mode()
def streams(model, blocks):
    """Per site Float[B, L, H]: the residual stream before it; and the last one."""
    ids = torch.from_numpy(blocks)
    states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    rope = model.model.rotary_emb(states[0], torch.arange(ids.shape[1])[None])
    found = []
    for index, layer in enumerate(model.model.layers):
        every_layer = model.config.sliding_window if model.config.model_type == "mistral" else None
        mask = causal(ids.shape[1], getattr(layer.self_attn, "sliding_window", None) or every_layer)
        middle = states[index] + layer.self_attn(layer.input_layernorm(states[index]), rope, mask)[0]
        found += [states[index], middle]
    return [*found, found[-1] + layer.mlp(layer.post_attention_layernorm(found[-1]))]


def hill(module, zero=1e-9):
    """The exponent of a module's weights by its formula, over eigenvalues above ``zero``."""
    weight = module.weight.detach().double().numpy()
    values = [value for value in sorted(np.linalg.eigvalsh(weight.T @ weight)) if value > zero]
    n, k = len(values), len(values) // 2
    return 1 + k / sum(log(values[n - i] / values[n - k - 1]) for i in range(1, k + 1))


def flatten(model, layer, flat, but=None):
    """Gives all modules of a layer but one such weights."""
    for module in projections(model, layer):
        if module is not but:
            module.weight.data = flat(*module.weight.shape)


# --- what each statistic is ---


@families
def test_outliers_are_the_share_of_large_entries_of_a_layer(name):
    model = heavy_tailed(name)
    seen, found = inputs(model, BLOCKS), measured(model).outliers
    for layer in range(3):
        entries = []
        for module in projections(model, layer):
            norms = [sum(value**2 for value in column) ** 0.5 for column in seen[module].T.tolist()]
            for row in module.weight.tolist():
                entries += [abs(weight) * norm for weight, norm in zip(row, norms, strict=True)]
        mean = sum(entries) / len(entries)
        share = sum(entry > 5 * mean for entry in entries) / len(entries)
        assert of_layer(model, found, layer) == pytest.approx(share, abs=1.5 / len(entries))
        assert share > 20 / len(entries)
    assert OUTLIER_FACTOR == 5


@families
def test_alpha_is_hills_estimate_on_the_squared_singular_values(name):
    model = tiny.model(name)
    found = measured(model).alpha
    for layer in range(3):
        alphas = [hill(module) for module in projections(model, layer)]
        assert of_layer(model, found, layer) == pytest.approx(sum(alphas) / len(alphas), rel=1e-4)


@pytest.mark.parametrize("exponent", [1.5, 2.0, 4.0])
def test_alpha_of_an_exact_power_law_is_known(exponent):
    model, expected = tiny.model(), []
    for module in projections(model, 1):
        count = min(module.weight.shape)
        values = (np.arange(1, count + 1) / (count + 1)) ** (-1 / (exponent - 1))
        weight = torch.zeros(module.weight.shape)
        weight[np.random.default_rng(0).permutation(count), np.arange(count)] = torch.from_numpy(values**0.5).float()
        module.weight.data = weight
        k = count // 2
        expected.append(1 + (exponent - 1) * k / (k * log(k + 1) - lgamma(k + 1)))
    assert measured(model).alpha[2] == pytest.approx(np.mean(expected), rel=1e-3)


@pytest.mark.parametrize("name", tiny.LLAMA_LIKE)
def test_influence_is_how_far_a_sub_layer_turns_the_residual_stream(name):
    model = tiny.model(name)
    found, states = measured(model).influence, streams(model, BLOCKS)
    for index, (before, after) in enumerate(zip(states[:-1], states[1:], strict=True)):
        cosines = []
        for x, y in zip(before.reshape(-1, 32).double().numpy(), after.reshape(-1, 32).double().numpy(), strict=True):
            cosines.append(x @ y / (x @ x) ** 0.5 / (y @ y) ** 0.5)
        assert len(cosines) == BLOCKS.size
        assert found[index] == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-4)
        assert found[index] > 1e-3


@families
def test_what_comes_out_of_a_sub_layer_is_what_changed_the_stream(name):
    """The ends of sub-layers are where the family's own code has them: stream + what came out = the next stream."""
    model, seen = tiny.model(name), {}
    layout, stack = layout_of_model(model), stack_of(model)
    ends = [ends_of(model, site) for site in layout.sites]
    ends = [pair for index, pair in enumerate(ends) if pair not in ends[:index]]  # all experts of a layer share theirs
    assert len(ends) == 2 * depth(model)
    for index, (entrance, exit) in enumerate(ends):
        entrance.register_forward_pre_hook(lambda _, inputs, at=index: seen.update({(at, "in"): inputs[0].reshape(-1, 32)}))
        exit.register_forward_hook(lambda _, __, output, at=index: seen.update({(at, "out"): output.reshape(-1, 32)}))
    for layer in range(depth(model)):
        stack[layer].register_forward_pre_hook(lambda _, inputs, at=layer: seen.update({at: inputs[0].reshape(-1, 32)}))
        stack[layer].register_forward_hook(lambda _, __, output, at=layer: seen.update({at + 1: output.reshape(-1, 32)}))
    tiny.logits(model, BLOCKS[:1])
    factor = getattr(model.config, "residual_multiplier", 1)
    norms = [getattr(stack[layer], f"{kind}_layer_norm", None) for layer in range(depth(model)) for kind in ("self_attn", "final")]
    for index in range(0, 2 * depth(model), 2):
        first, second = factor * seen[index, "out"], factor * seen[index + 1, "out"]
        between = seen[index, "in"] + first
        if getattr(model.config, "do_layer_norm_before", True) is False:
            between = norms[index](between)
            expected = norms[index + 1](between + second)
        elif getattr(model.config, "use_parallel_residual", False):
            between, expected = seen[index, "in"], between + second
        else:
            expected = between + second
        torch.testing.assert_close(seen[index, "in"], seen[index // 2], rtol=0, atol=0)
        torch.testing.assert_close(seen[index + 1, "in"], between, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(seen[index // 2 + 1], expected, rtol=1e-5, atol=1e-5)


@families
def test_variance_is_flaps_score_and_spread_is_its_deviation_over_columns(name):
    model = tiny.model(name)
    layout, seen, found = layout_of_model(model), inputs(model, BLOCKS), measured(model)
    flap = score_units(model, layout, BLOCKS, "flap", "a text", 0)
    for index, site in enumerate(layout.sites):
        assert np.array_equal(found.variance[index], flap.scores[index])
        reader = linear(model, site.reader)
        columns = len(seen[reader]) / BLOCKS.size * seen[reader].var(0) * reader.weight.detach().double().square().sum(0).numpy()
        assert found.spread[index] == pytest.approx(columns.std(), rel=1e-3)


# --- properties ---


@families
def test_statistics_are_finite_differ_between_layers_and_have_the_right_sizes(name):
    model = heavy_tailed(name)
    found, sites = measured(model), layout_of_model(model).sites
    for values in (found.outliers, found.alpha):
        assert values.shape == (len(sites),) and len({of_layer(model, values, at) for at in range(depth(model))}) == depth(model)
    assert found.influence.shape == (len(sites),) and len(set(found.influence)) == 2 * depth(model)  # the sub-layers'
    assert found.spread.shape == (len(sites),) and len(set(found.spread)) == len(sites)
    assert (found.influence > 0).all() and (found.spread > 0).all()
    assert (found.alpha > 1).all() and (found.influence < 2).all()


def test_the_model_is_unchanged_and_the_text_is_read_once():
    model, calls = tiny.model("llama-biases"), []
    before = tiny.snapshot(model)
    handle = model.base_model.register_forward_hook(lambda *_: calls.append(1))
    measured(model)
    handle.remove()
    assert tiny.snapshot(model) == before and len(calls) == len(BLOCKS)


def test_the_model_is_unchanged_when_measuring_fails():
    model = tiny.model()
    before = tiny.snapshot(model)
    with pytest.raises(IndexError):
        measured(model, np.full((2, 8), 10**6))
    assert tiny.snapshot(model) == before


def test_no_text_is_refused():
    with refuses(InputError):
        measured(tiny.model(), np.zeros((0, 8), dtype=np.int64))


def test_the_order_of_the_blocks_does_not_matter_and_the_text_does():
    one, other, reverse = (measured(heavy_tailed("qwen2-gqa"), blocks) for blocks in (BLOCKS, tiny.blocks(5, 12, 1), BLOCKS[::-1]))
    for name in ("outliers", "alpha", "influence", "spread"):
        np.testing.assert_allclose(getattr(one, name), getattr(reverse, name), rtol=1e-4)
        assert np.allclose(getattr(one, name), getattr(other, name), rtol=1e-4) is (name == "alpha")


def test_half_precision_gives_nearly_the_same():
    full, half = (measured(tiny.model(dtype=dtype)) for dtype in (torch.float32, torch.bfloat16))
    np.testing.assert_allclose(half.alpha, full.alpha, rtol=0.02)
    np.testing.assert_allclose(half.influence, full.influence, rtol=0.1)


def test_a_sub_layer_that_adds_nothing_has_no_influence_and_one_that_inverts_has_the_most():
    model = tiny.model("llama-mha")
    attention, mlp = model.model.layers[1].self_attn, model.model.layers[2].mlp
    with torch.no_grad():
        attention.o_proj.weight.zero_()
    handle = mlp.down_proj.register_forward_hook(lambda *_: -2 * stream[0])
    stream = []
    other = model.model.layers[2].post_attention_layernorm.register_forward_pre_hook(
        lambda _, args: stream.__setitem__(slice(None), args)
    )
    influence = measured(model).influence
    handle.remove(), other.remove()
    assert influence[2] == pytest.approx(0, abs=1e-6) and influence[5] == pytest.approx(2)


def test_alpha_does_not_depend_on_the_size_of_the_weights():
    model = tiny.model()
    before = measured(model).alpha
    with torch.no_grad():
        for layer in range(3):
            for module in projections(model, layer):
                module.weight *= 5
    np.testing.assert_allclose(measured(model).alpha, before, rtol=1e-4)


def test_eigenvalues_of_zero_do_not_count():
    model = tiny.model()
    before = measured(model).alpha
    with torch.no_grad():
        for module in projections(model, 1):
            u, s, v = torch.linalg.svd(module.weight, full_matrices=False)
            s[len(s) // 2 :] = 0
            module.weight.copy_(u * s @ v)
    after, expected = measured(model).alpha, np.mean([hill(module, 1e-6) for module in projections(model, 1)])
    assert after[2] == pytest.approx(expected, rel=1e-3) and after[2] != pytest.approx(before[2], rel=0.01)


@pytest.mark.parametrize("flat", [torch.zeros, torch.eye, torch.ones], ids=["zero", "identity", "rank one"])
def test_matrices_without_a_tail_are_left_out_of_alpha(flat):
    model = tiny.model()
    before, kept = measured(model).alpha, model.model.layers[1].self_attn.q_proj
    flatten(model, 1, flat, kept)
    assert measured(model).alpha[2] == pytest.approx(hill(kept), rel=1e-4)
    flatten(model, 1, flat)
    assert measured(model).alpha[2] == pytest.approx((before[0] + before[4]) / 2)
    for layer in range(3):
        flatten(model, layer, flat)
    assert len(set(measured(model).alpha)) == 1


def test_every_family_says_where_its_sub_layers_begin():
    assert set(ENTRANCES) == {*FAMILIES, "opt with norms behind"} and set(EXITS) <= set(FAMILIES)
    assert all({"attn", "ffn"} <= set(places) <= {"attn", "ffn", "expert"} for places in ENTRANCES.values())


def test_a_pruned_model_has_statistics_too():
    model = tiny.model("qwen3-gqa")
    layout = layout_of_model(model)
    small = cut(model, layout, random_mask(layout))
    assert [len(site) for site in measured(small).variance] == layout_of_model(small).units.tolist()
