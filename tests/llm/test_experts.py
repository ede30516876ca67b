import numpy as np
import pytest
import torch

import tiny_models as tiny
from ppf.llm.architectures import layout_of_model, linear
from ppf.llm.compensation import reader_means
from ppf.llm.depth import with_depth
from ppf.llm.experts import separate_experts
from ppf.llm.load import adopt_model, load_model
from ppf.llm.masking import masked, narrowed
from ppf.llm.pruned_model import Experts
from ppf.llm.ridge import fit_ridge
from ppf.llm.scores import SCORES, score_units
from ppf.llm.surgery import cut
from ppf.space.allocation import allocate
from ppf.space.budget import Budget
from ppf.space.plan import wish_of
from ppf.space.policy import Policy
from ridge_reference import as_fitted

IDS = tiny.blocks(2, 9)
BLOCKS = tiny.blocks(3, 12)
mixtures = pytest.mark.parametrize("name", ["mixtral-gqa", "qwen2_moe-shared", "qwen3_moe-sparse-tied"])


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, Experts)]


@mixtures
def test_separate_experts_compute_what_fused_ones_do_on_the_same_memory(name):
    fused, model = tiny.stored(name), tiny.stored(name)
    memory = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
    assert separate_experts(model) is model and experts_of(model) and not experts_of(fused)
    torch.testing.assert_close(tiny.logits(model, IDS), tiny.logits(fused, IDS), rtol=0, atol=1e-5)
    assert {tensor.untyped_storage().data_ptr() for tensor in model.parameters()} == memory
    assert sum(one.numel() for one in model.parameters()) == sum(one.numel() for one in fused.parameters())
    before = experts_of(model)
    assert all(one is other for one, other in zip(experts_of(separate_experts(model)), before, strict=True))


def test_a_model_without_experts_stays_as_it_is():
    model = tiny.model("llama-mha")
    before = tiny.snapshot(model)
    assert separate_experts(model) is model and tiny.snapshot(model) == before


@mixtures
def test_a_folder_and_an_object_give_the_same_model_and_the_caller_s_stays_fused(tmp_path, name):
    mine = tiny.stored(name)
    before = tiny.snapshot(mine)
    loaded, adopted = load_model(str(tiny.save(tmp_path, name))), adopt_model(mine, tiny.tokenizer())
    assert loaded.layout == adopted.layout and loaded.digest == adopted.digest
    assert torch.equal(tiny.logits(loaded.model, IDS), tiny.logits(adopted.model, IDS))
    assert tiny.snapshot(mine) == before and not experts_of(mine)


@mixtures
def test_every_expert_is_a_site_of_its_own_width(name):
    model = tiny.model(name)
    layout = layout_of_model(model)
    smaller = cut(model, layout, tiny.MASKS["random"](layout))
    widths = [expert.down_proj.in_features for experts in experts_of(smaller) for expert in experts]
    assert widths == [site.units for site in layout_of_model(smaller).sites if site.role == "expert"]
    assert len(set(widths)) > 2
    assert len({(site.layer, site.kind) for site in layout.sites}) == len(layout.sites)


@mixtures
def test_an_expert_that_no_token_reaches_can_be_scored_cut_and_made_up_for(name):
    model = tiny.model(name)
    layout = layout_of_model(model)
    block = next(module for module in model.modules() if hasattr(module, "experts"))
    block.gate.register_forward_hook(lambda _, __, out: (out[0], out[1], out[2] % 2))  # only experts 0 and 1 are used
    idle = next(at for at, site in enumerate(layout.sites) if site.kind == "expert3")
    for method in SCORES:
        scores = score_units(model, layout, BLOCKS, method, "a text", 0).scores
        assert bool((scores[idle] == 0).all()) is (method in ("taylor", "flap", "wanda_sp"))
    mask, fill = tiny.MASKS["random"](layout), reader_means(model, layout, BLOCKS)
    assert not fill.means[idle].any()
    fitted = fit_ridge(model, layout, mask, BLOCKS)
    kept = torch.from_numpy(mask.bits[idle].copy())
    assert torch.equal(fitted.weights[idle], linear(model, layout.sites[idle].reader).weight[:, kept])


@mixtures
def test_the_means_of_an_expert_are_over_its_own_tokens(name):
    model = tiny.model(name)
    layout = layout_of_model(model)
    fill = reader_means(model, layout, BLOCKS)
    for site, mean in zip(layout.sites, fill.means, strict=True):
        seen = []
        handle = linear(model, site.reader).register_forward_pre_hook(lambda _, inputs, to=seen: to.append(inputs[0]))
        for row in BLOCKS:
            tiny.logits(model, row[None])
        handle.remove()
        if seen:
            tokens = torch.cat([one.reshape(-1, one.shape[-1]) for one in seen]).double()
            assert site.role != "expert" or len(tokens) < BLOCKS.size
            torch.testing.assert_close(torch.from_numpy(mean.copy()).double(), tokens.mean(0), rtol=0, atol=1e-5)


def test_masking_an_expert_changes_only_the_tokens_that_are_sent_to_it():
    model = tiny.model("mixtral-gqa")
    layout = layout_of_model(model)
    last = [at for at, site in enumerate(layout.sites) if site.role == "expert" and site.layer == 2]
    mask = tiny.MASKS["nothing"](layout)
    bits = [one.copy() for one in mask.bits]
    bits[last[0]][1:] = False
    sent = []
    gate = model.model.layers[2].mlp.gate
    handle = gate.register_forward_hook(lambda _, __, out: sent.append((out[2] == 0).any(1)))
    dense = tiny.logits(model, IDS)
    handle.remove()
    with masked(model, layout, type(mask)(tuple(bits))):
        changed = (tiny.logits(model, IDS) != dense).any(-1).flatten()
    assert torch.equal(changed, sent[0]) and 0 < sent[0].sum() < len(sent[0])


# --- whole experts ---


def deep(name, case):
    model = tiny.model(name)
    layout = with_depth(model, layout_of_model(model))
    return model, layout, tiny.EXPERT_MASKS[case](layout)


def left(layout, mask):
    """By layer, whether each of its experts is left."""
    found = {}
    for site, bits in zip(layout.sites, mask.bits, strict=True):
        if site.role == "expert":
            found.setdefault(site.layer, []).append(bool(bits.any()))
    return found


@mixtures
@pytest.mark.parametrize("case", ["one", "differing", "one left"])
@pytest.mark.parametrize("running", [masked, narrowed])
@torch.inference_mode()
def test_tokens_are_sent_as_if_the_logits_of_gone_experts_were_minus_infinity(name, case, running):
    model, layout, mask = deep(name, case)
    asked, reached, handles = {}, set(), []
    for layer in left(layout, mask):
        block = model.model.layers[layer].mlp
        gate = block.gate.register_forward_hook(lambda gate, inputs, out, layer=layer: asked.update({layer: (gate, inputs, out)}))
        handles.append(gate)
        for index, expert in enumerate(block.experts):
            key = (layer, index)
            handles.append(expert.register_forward_pre_hook(lambda *_, key=key: reached.add(key)))
    with running(model, layout, mask):
        tiny.logits(model, IDS)
        for layer, stays in left(layout, mask).items():  # asked again, so that its answer is the one under the mask
            gate, inputs, _ = asked[layer]
            _, scores, chosen = gate(*inputs)
            hidden = torch.full((len(stays),), -torch.inf).masked_fill(torch.tensor(stays), 0)
            odds = (inputs[0] @ gate.weight.T + hidden).softmax(-1)
            best, places = odds.topk(min(gate.top_k, sum(stays)))
            norm = best.sum(-1, keepdim=True) if getattr(gate, "norm_topk_prob", True) else 1
            assert torch.equal(chosen, places)
            torch.testing.assert_close(scores, best / norm, rtol=0, atol=1e-6)
    for handle in handles:
        handle.remove()
    assert reached and all(left(layout, mask)[layer][index] for layer, index in reached)


@mixtures
@pytest.mark.parametrize("case", tiny.EXPERT_MASKS)
def test_a_cut_model_holds_the_experts_that_are_left_and_their_rows_of_the_router(name, case):
    model, layout, mask = deep(name, case)
    smaller = cut(model, layout, mask)
    kept = layout.kept_layers(mask.allocation.kept)
    for index, layer in enumerate(smaller.model.layers):
        stays = left(layout, mask).get(kept[index])
        if stays is None or not hasattr(layer.mlp, "experts"):
            assert stays is None or not any(stays)
            continue
        ids = [number for number, stay in enumerate(stays) if stay]
        assert len(layer.mlp.experts) == layer.mlp.gate.num_experts == len(ids) and layer.mlp.gate.top_k == min(2, len(ids))
        assert torch.equal(layer.mlp.gate.weight, model.model.layers[kept[index]].mlp.gate.weight[ids])
    assert sum(one.numel() for one in smaller.parameters()) == layout.kept_params(mask.allocation.kept)


@mixtures
@pytest.mark.parametrize("case", ["differing", "one left", "none left"])
def test_what_makes_up_for_channels_leaves_gone_experts_alone(name, case):
    model, layout, mask = deep(name, case)
    fill = reader_means(model, layout, BLOCKS)
    with masked(model, layout, mask, fill):
        expected = tiny.logits(model, IDS)
    torch.testing.assert_close(tiny.logits(cut(model, layout, mask, fill), IDS), expected, rtol=0, atol=1e-5)
    fitted = fit_ridge(model, layout, mask, BLOCKS)
    with as_fitted(model, layout, mask, fitted):
        expected = tiny.logits(model, IDS)
    torch.testing.assert_close(tiny.logits(cut(model, layout, mask, fitted=fitted), IDS), expected, rtol=0, atol=1e-5)


def test_a_plan_of_ratios_has_one_for_all_experts_of_a_layer():
    layout = layout_of_model(tiny.model("mixtral-gqa"))
    policy, _ = wish_of({"attn": [0, 0.1, 0.2], "expert": [0.3, 0.4, 0.5]}, layout)
    wanted = {"attn": [0, 0.1, 0.2], "expert": [0.3, 0.4, 0.5]}
    assert policy.keep.tolist() == pytest.approx([1 - wanted[site.role][site.layer] for site in layout.sites])


@mixtures
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6])
def test_a_budget_is_met_to_within_one_channel(name, ratio):
    layout = layout_of_model(tiny.model(name))
    budget = Budget.from_ratio(ratio, layout)
    for seed in range(5):
        policy = Policy(np.random.default_rng(seed).random(len(layout.sites)))
        kept = allocate(policy, budget, layout).kept
        channel = min(site.cost for site in layout.sites if site.role != "attn")
        assert 0 <= (layout.units - kept) @ layout.costs - budget.remove < channel
