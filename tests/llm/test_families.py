import json
import subprocess
import sys

import pytest

import tiny_models as tiny
from ppf import cli
from ppf.llm.architectures import FAMILIES, layout_of_model
from ppf.llm.depth import may_go, with_depth
from ppf.llm.families import KINDS, supported
from ppf.llm.gguf_archs import ARCHITECTURES
from ppf.llm.pruned_model import PRUNED
from ppf.llm.surgery import cut

FOUND = {one.family: one for one in supported()}


def test_every_family_is_listed_once_and_has_a_tiny_model():
    assert list(FOUND) == sorted(FAMILIES) and len(supported()) == len(FAMILIES)
    assert {name.split("-")[0] for name in tiny.TINY} == set(FAMILIES) == set(KINDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_is_what_the_code_has_for_the_default_config(family):
    config_class, _, lm_class = PRUNED[family]
    sites, said = list(FAMILIES[family](config_class())), FOUND[family]
    heads = "KV groups" if hasattr(config_class(), "num_key_value_heads") else "heads"
    units = {"attn": heads, "ffn": "FFN channels", "expert": "expert channels"}
    assert said.units == tuple(dict.fromkeys(units[site.role] for site in sites))
    depth, free = {"attn": "attention", "ffn": "FFN", "expert": "experts"}, {site.role for site in sites if may_go(site)}
    assert said.depth == tuple(word for role, word in depth.items() if role in free)
    assert said.vllm is (lm_class.is_backend_compatible() and all(site.role != "expert" for site in sites))


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


def test_the_command_needs_neither_torch_nor_transformers():
    code = "import sys; from ppf import cli; cli.main(['models']); print({'torch', 'transformers'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "set()", result.stderr
