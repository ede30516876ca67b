import json

import pytest

import tiny_models as tiny
from ppf import cli
from ppf.llm.architectures import FAMILIES, layout_of_model
from ppf.llm.depth import with_depth
from ppf.llm.families import supported
from ppf.llm.gguf_archs import ARCHITECTURES
from ppf.llm.surgery import cut

FOUND = {one.family: one for one in supported()}


def test_every_family_is_listed_once_and_has_a_tiny_model():
    assert list(FOUND) == sorted(FAMILIES) and len(supported()) == len(FAMILIES)
    assert {name.split("-")[0] for name in tiny.TINY} == set(FAMILIES)


@pytest.mark.parametrize("name", tiny.TINY)
def test_what_is_said_is_what_the_model_has(name):
    model = tiny.model(name)
    layout = layout_of_model(model)
    said = FOUND[layout.model_type]
    assert {site.role for site in layout.sites} <= {"attn", "ffn", "expert"} and len(said.units) >= 2
    assert ("expert channels" in said.units) is any(site.role == "expert" for site in layout.sites)
    grouped = any(dict(site.shapes).get("num_key_value_heads") for site in layout.sites)
    assert ("KV groups" in said.units) is grouped and ("heads" in said.units) is not grouped
    assert said.gguf == ARCHITECTURES.get(layout.model_type)
    if name not in tiny.NO_DEPTH:
        deep = {site.role for site in with_depth(model, layout).sites if site.floor == 0}
        words = {{"attn": "attention", "ffn": "FFN", "expert": "experts"}[role] for role in deep}
        plain_too = "expert channels" in said.units and {"FFN"}  # of layers that have no experts, if there are any
        assert set(said.depth) <= words <= {*said.depth, *(plain_too or ())}
    smaller = cut(model, layout, tiny.MASKS["random"](layout))
    assert said.vllm is (smaller.is_backend_compatible() and "expert channels" not in said.units)


def test_the_command_lists_them_as_a_table_and_as_json(capsys):
    assert cli.main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[3:-3]] == sorted(FAMILIES)
    assert cli.main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["families"]
    assert [one["family"] for one in found] == sorted(FAMILIES)
    assert {one["family"]: one["gguf"] for one in found} == {
        family: list(ARCHITECTURES[family]) if family in ARCHITECTURES else None for family in FAMILIES
    }
