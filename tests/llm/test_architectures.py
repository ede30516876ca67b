import pytest
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig, LlamaModel

import tiny_models as tiny
from builders import refuses
from ppf.errors import UnsupportedError
from ppf.llm.architectures import FAMILIES, family_of, layout_of, layout_of_model, linear, skeleton, stack_of
from ppf.space.layout import Layout


def rows_of(layout):
    """Which rows of which module each unit of each site owns."""
    return [
        (rows.module, range(rows.offset + unit * rows.width, rows.offset + (unit + 1) * rows.width))
        for site in layout.sites
        for rows in site.writers
        for unit in range(site.units)
    ]


FINGERPRINTS = {
    "llama-mha": "faf6b132f3c6dca29f95bd81384db690",
    "mistral-gqa": "c966c6bbf2881abd4b4a1b0851449885",
    "qwen2-gqa": "6621d4be14d7a5a5d8bb7710835449c3",
    "qwen3-gqa": "860a9426cf150913576482865d68f08a",
}
"""Studies carry them: another one here would make every fitted study of the family useless."""


@pytest.mark.parametrize("name", FINGERPRINTS)
def test_fingerprints_of_families_with_fitted_studies_stay(name):
    layout = layout_of(tiny.TINY[name]())
    assert layout.fingerprint == FINGERPRINTS[name]
    assert all("norms" not in site for site in layout.to_json()["sites"])


def test_a_norm_over_all_heads_belongs_to_the_layout():
    layout = layout_of(tiny.TINY["olmo2-gqa"]())
    attn, ffn = layout.sites[:2]
    assert [(rows.module[-6:], rows.width) for rows in attn.norms] == [("q_norm", 16), ("k_norm", 8)] and ffn.norms == ()
    assert Layout.from_json(layout.to_json()) == layout and layout.to_json()["sites"][0]["norms"]
    assert attn.cost == 32 * (16 + 8 + 8) + 16 + 8 + 16 * 32


def linears(model):
    """All linear modules of the decoder layers, by path, but the gate of an expert that all tokens see."""
    found = {path: module for path, module in model.named_modules() if ".layers." in path and isinstance(module, nn.Linear)}
    return {path: module for path, module in found.items() if not path.endswith("shared_expert_gate")}


@pytest.mark.parametrize("name", tiny.TINY)
def test_the_config_alone_gives_the_layout_of_the_model(name):
    layout = layout_of(tiny.TINY[name]())
    assert layout == layout_of_model(tiny.model(name))
    assert Layout.from_json(layout.to_json()).fingerprint == layout.fingerprint


@pytest.mark.parametrize("name", tiny.TINY)
def test_units_own_every_row_and_column_of_their_modules_once(name):
    model = tiny.model(name)
    layout = layout_of_model(model)
    owned = {}
    for module, rows in rows_of(layout):
        owned.setdefault(module, []).extend(rows)
    projections = linears(model)
    readers = {site.reader: site for site in layout.sites}
    assert set(owned) | set(readers) == set(projections) and not set(owned) & set(readers)
    for path, module in projections.items():
        if path in owned:
            assert sorted(owned[path]) == list(range(module.out_features)), path
        else:
            assert readers[path].units * readers[path].columns == module.in_features, path


@pytest.mark.parametrize("name", tiny.TINY)
def test_costs_count_every_prunable_parameter_and_the_total_counts_all(name):
    model = tiny.model(name)
    layout = layout_of_model(model)
    readers = {f"{site.reader}.bias" for site in layout.sites}
    paths = {*linears(model), *(rows.module for site in layout.sites for rows in site.norms)}
    prunable = [p for path, p in model.named_parameters() if path.rpartition(".")[0] in paths and path not in readers]
    assert layout.prunable == sum(parameter.numel() for parameter in prunable)
    assert layout.total == sum(parameter.numel() for parameter in model.parameters())
    assert layout.layers == [site.kind for site in layout.sites].count("attn") == len(stack_of(model))
    assert [site.layer for site in layout.sites] == sorted(site.layer for site in layout.sites)
    assert layout.model_type == name.split("-")[0]


def test_tied_embeddings_are_counted_once():
    tied, untied = (layout_of(LlamaConfig(**tiny.SIZES, tie_word_embeddings=tie)) for tie in (True, False))
    assert untied.total - tied.total == 96 * 32 and untied.prunable == tied.prunable
    assert untied.fingerprint != tied.fingerprint


def test_the_kv_cache_of_a_unit():
    layout = layout_of(tiny.TINY["qwen3-gqa"]())
    assert {site.cache for site in layout.sites if site.kind == "attn"} == {2 * 16}
    assert {site.cache for site in layout.sites if site.kind == "ffn"} == {0}


def test_a_large_layout_takes_no_memory():
    shell = skeleton(LlamaConfig(hidden_size=8192, intermediate_size=28672, num_attention_heads=64, num_key_value_heads=8))
    assert {parameter.device.type for parameter in shell.parameters()} == {"meta"}
    assert layout_of_model(shell).units.tolist() == [8, 28672] * 32


@pytest.mark.parametrize("config", [GPT2Config(), BertConfig()])
def test_another_family_is_refused_with_the_known_ones(config):
    for question in (family_of, layout_of, skeleton):
        with refuses(UnsupportedError) as caught:
            question(config)
        assert all(family in str(caught.value) for family in FAMILIES)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 0},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5, "num_key_value_heads": 2},
        {"hidden_size": -32},
        {"vocab_size": 10**30},
        {"hidden_act": "unheard of"},
        {"pad_token_id": 10**6},
        {"rope_parameters": {"rope_type": "unheard of", "rope_theta": 1e4}},
    ],
)
def test_a_config_that_no_model_can_have_is_refused(changes):
    config = tiny.TINY["llama-mha"]()
    for field, value in changes.items():
        setattr(config, field, value)
    with refuses(UnsupportedError):
        layout_of(config)


def test_only_plain_linear_layers_of_a_whole_causal_lm_will_do():
    class Packed(nn.Linear):
        """What quantisers put in place of a linear layer."""

    packed, wrapped = tiny.model(), tiny.model()
    packed.model.layers[1].mlp.up_proj = Packed(32, 40)
    wrapped.model.layers[1].self_attn.o_proj = nn.Sequential(wrapped.model.layers[1].self_attn.o_proj)
    for model in (packed, wrapped, LlamaModel(tiny.TINY["llama-mha"]())):
        with refuses(UnsupportedError):
            layout_of_model(model)
    assert isinstance(linear(tiny.model(), "model.layers.0.mlp.up_proj"), nn.Linear)
    with refuses(UnsupportedError):
        linear(tiny.model(), "model.norm")
