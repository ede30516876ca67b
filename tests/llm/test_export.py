import ast
import copy
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import tiny_models as tiny
from builders import random_mask, refuses
from exports import label, run_without_ppf, smaller
from ppf.errors import DamagedError
from ppf.llm import export as module
from ppf.llm import pruned_model
from ppf.llm.architectures import layout_of_model, linear
from ppf.llm.auto import register
from ppf.llm.export import export, verify, weight_bytes
from ppf.llm.load import load_model
from ppf.llm.placement import convert
from ppf.llm.surgery import cut
from ppf.space.mask import Mask

IDS = torch.from_numpy(tiny.blocks(2, 10))
PLAN = {"ratio": 0.3, "note": "ü"}
CASES = [(name, torch.float32) for name in tiny.TINY]
CASES += [(name, torch.bfloat16) for name in ("llama-gqa-tied", "mistral-gqa", "qwen2-gqa", "qwen3-biases")]
DEEP = {
    "llama-biases": "layer", "llama-gqa-tied": "attention", "gemma2-gqa": "all", "gemma3_text-gqa": "attention", "olmo2-gqa": "ffn",
    "gpt_neox-serial-tied": "last", "opt-mha": "ffn", "phi3-gqa": "first", "smollm3-gqa-window": "layer", "mixtral-gqa": "all",
    "qwen2_moe-shared": "differing", "qwen3_moe-sparse-tied": "none left", "qwen2_moe-experts-everywhere": "none left",
}  # fmt: skip
CASES += [(f"{name}+{mask}", torch.float32) for name, mask in DEEP.items()]
STRANGER = """
import json, sys, torch
sys.modules["ppf"] = None
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

torch.set_num_threads(1)
sys.stdin.close()
ids = torch.tensor(json.loads(sys.argv[2]))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    answers = {}
    for dtype in ("auto", torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype)
        answers[f"logits {dtype}"] = model(ids).logits
        if dtype == "auto":
            cached, past = [], None
            for step in ids.T:
                output = model(step[:, None], past_key_values=past, use_cache=True)
                past, cached = output.past_key_values, [*cached, output.logits]
            answers["cached"] = torch.cat(cached, dim=1)
            answers["generated"] = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
    answers["hidden"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
    answers["words"] = AutoTokenizer.from_pretrained(folder)("w7 w3 w50", return_tensors="pt")["input_ids"]
    save_file({name: tensor.detach().contiguous() for name, tensor in answers.items()}, sys.argv[3] + "/" + folder.name)
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (ValueError, OSError) as error:
        assert "trust_remote_code" in str(error)
        print(folder.name, "is refused without the flag")
"""


@dataclass
class Exported:
    folder: Path
    model: PreTrainedModel
    bytes: int
    answers: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every case as a folder, and what a process without ppf made of it."""
    folders, answers, home = (tmp_path_factory.mktemp(name) for name in ("folders", "answers", "home"))
    made = {}
    for name, dtype in CASES:
        model, folder = smaller(name, dtype=dtype), folders / label(name, dtype)
        made[name, dtype] = Exported(folder, model, export(model, tiny.tokenizer(), PLAN, folder), {})
    said = run_without_ppf(STRANGER, home, folders, json.dumps(IDS.tolist()), answers)
    assert all(f"{label(*case)} is refused without the flag" in said for case in CASES)
    for (name, dtype), one in made.items():
        one.answers.update(load_file(answers / label(name, dtype)))
    return made


every = pytest.mark.parametrize("case", CASES, ids=[label(*case) for case in CASES])


# --- what other programs read ---


@every
@torch.inference_mode()
def test_a_process_without_ppf_answers_bit_for_bit(exported, case):
    model, answers = exported[case].model, exported[case].answers
    for dtype in ("auto", case[1]):
        assert tiny.same(answers[f"logits {dtype}"], model(IDS).logits, case[0])
    cached, past = [], None
    for step in IDS.T:
        output = model(step[:, None], past_key_values=past, use_cache=True)
        past, cached = output.past_key_values, [*cached, output.logits]
    assert tiny.same(answers["cached"], torch.cat(cached, dim=1), case[0])
    assert tiny.same(answers["hidden"], model.base_model(IDS).last_hidden_state, case[0])
    assert answers["words"].tolist() == [[7, 3, 50]]


@every
def test_its_generation_is_that_of_the_model_in_memory(exported, case):
    model = exported[case].model
    for use_cache in (True, False):
        made = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=9, do_sample=False, use_cache=use_cache)
        if use_cache or case[1] == torch.float32:
            assert torch.equal(exported[case].answers["generated"], made)


@every
@torch.inference_mode()
def test_any_precision_can_be_asked_for(exported, case):
    for dtype in (torch.float32, torch.bfloat16):
        model = convert(copy.deepcopy(exported[case].model), torch.device("cpu"), dtype)
        assert tiny.same(exported[case].answers[f"logits {dtype}"].float(), model(IDS).logits.float(), case[0])


@every
@torch.inference_mode()
def test_a_process_that_registered_needs_no_flag(exported, case):
    register()
    folder, model = exported[case].folder, exported[case].model
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model) and again.dtype == model.dtype
    assert tiny.same(again(IDS).logits, model(IDS).logits, case[0])
    hidden = AutoModel.from_pretrained(folder)(IDS).last_hidden_state
    assert tiny.same(hidden, model.base_model(IDS).last_hidden_state, case[0])


@every
def test_ppf_itself_loads_it_and_can_go_on(exported, case):
    loaded = load_model(str(exported[case].folder))
    assert loaded.layout == layout_of_model(exported[case].model)
    assert loaded.layout.total == sum(parameter.numel() for parameter in exported[case].model.parameters())
    cut(loaded.model, loaded.layout, random_mask(loaded.layout))


# --- what lies in the folder ---


@every
def test_the_config_says_the_widths_in_both_ways(exported, case):
    folder, model = exported[case].folder, exported[case].model
    config = json.loads((folder / "config.json").read_text())
    family = case[0].split("-")[0]
    assert config["model_type"] == f"ppf_{family}" and set(config["auto_map"]) == {
        "AutoConfig",
        "AutoModel",
        "AutoModelForCausalLM",
    }
    layout = layout_of_model(model)
    for layer in range(layout.layers):
        sites = [site for site in layout.sites if site.layer == layer]
        widths = {field: each * site.units for site in sites for field, each in site.shapes}
        experts = [site.units for site in sites if site.role == "expert"]
        if experts or config["ppf_layers"].get("expert_sizes", [None] * layout.layers)[layer] is not None:
            widths["expert_sizes"] = experts
        for site in sites:
            width = config["head_dim"] * widths["num_attention_heads"] if site.role == "attn" else site.units
            assert linear(model, site.reader).in_features == width
        plain = {field: widths_of[layer] for field, widths_of in config["ppf_layers"].items() if widths_of[layer] is not None}
        sparse = {field: config[field] for field in widths} | config["per_layer_config"].get(f"{layer:02d}", {})
        sparse |= config["per_layer_config"].get(str(layer), {})
        gone = {field: 0 for field, width in plain.items() if width == 0}
        assert plain == {**sparse, **gone} == {**widths, **gone} and bool(gone) is (len({site.role for site in sites}) < 2)
    assert config["dtype"] == str(case[1]).removeprefix("torch.")


@every
def test_the_files(exported, case):
    one = exported[case]
    names = {path.name for path in one.folder.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "modeling_ppf.py", "ppf.json", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert one.bytes == weight_bytes(one.folder) == (one.folder / "model.safetensors").stat().st_size
    payload = sum(parameter.numel() * parameter.element_size() for parameter in one.model.parameters())
    assert payload <= one.bytes < payload + 20_000
    assert json.loads((one.folder / "ppf.json").read_text()) == PLAN
    with safe_open(one.folder / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) is not one.model.config.tie_word_embeddings  # noqa: SIM118 (not a dict)
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in one.folder.iterdir())


def test_the_modeling_file_needs_transformers_alone(exported):
    source = (exported[CASES[0]].folder / module.MODELING_FILE).read_text()
    assert source == Path(pruned_model.__file__).read_text()
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    packages = {(node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0] for node in nodes}
    assert packages == {"torch", "transformers"}


def test_what_is_exported_stays_as_it_is(tmp_path):
    model = smaller()
    before = tiny.snapshot(model)
    export(model, tiny.tokenizer(), PLAN, tmp_path / "out")
    assert tiny.snapshot(model) == before


@pytest.mark.parametrize(("first", "then"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_model_that_was_cast_after_loading_is_saved_as_it_is(tmp_path, first, then):
    model = tiny.model("llama-wide-heads-rope", dtype=first).to(then)
    layout = layout_of_model(model)
    export(cut(model, layout, random_mask(layout)), tiny.tokenizer(), PLAN, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == then


def test_one_unit_everywhere_is_exported_too(tmp_path):
    model = tiny.model("qwen3-gqa")
    layout = layout_of_model(model)
    export(cut(model, layout, Mask(tuple(np.arange(units) == 1 for units in layout.units))), tiny.tokenizer(), {}, tmp_path / "out")
    assert load_model(str(tmp_path / "out")).layout.units.tolist() == [1] * 6


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_any_attention_is_checked_with_itself(tmp_path, attention):
    tiny.save(tmp_path / "dense", "llama-wide-heads-rope")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", attn_implementation=attention)
    layout = layout_of_model(dense)
    export(cut(dense, layout, random_mask(layout)), tiny.tokenizer(), PLAN, tmp_path / "out")  # refuses the least difference
    assert "attn" not in (tmp_path / "out" / "config.json").read_text()


def test_verify_compares_answers_and_not_files(exported, monkeypatch):
    one = exported[CASES[0]]
    verify(one.model, one.folder)
    with refuses(DamagedError):
        verify(smaller("llama-mha", seed=4), one.folder)

    class Deaf(torch.nn.Module):
        """Answers a hair differently."""

        def forward(self, input_ids):
            return SimpleNamespace(logits=torch.nextafter(one.model(input_ids).logits, torch.tensor(9.0)))

    monkeypatch.setattr(module, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=lambda *_, **__: Deaf()))
    with refuses(DamagedError):
        verify(one.model, one.folder)
