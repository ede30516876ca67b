"""The script that compares with vLLM, with a stand-in for vLLM: what it asks for, what it prints, how it ends."""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny_models as tiny
from builders import random_mask
from ppf.llm.architectures import layout_of_model
from ppf.llm.depth import with_depth
from ppf.llm.export import export
from ppf.llm.surgery import cut

TOOL = Path(__file__).parents[1] / "tools" / "check_vllm.py"


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("check_vllm", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["check_vllm"] = module  # its dataclass looks itself up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["check_vllm"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    dense = tiny.model("llama-mha")
    layout = layout_of_model(dense)
    place = tmp_path_factory.mktemp("export") / "model"
    export(cut(dense, layout, random_mask(layout)), tiny.tokenizer(), {}, place)
    return place


class StandIn:
    """Answers in vLLM's form with what transformers says, a constant off."""

    off = 0.0
    asked: dict = {}

    def __init__(self, model, **options):
        type(self).asked = options
        self.model = AutoModelForCausalLM.from_pretrained(model)

    @torch.inference_mode()
    def generate(self, prompts, greedy):
        for prompt in prompts:
            ids = prompt["prompt_token_ids"]
            whole = self.model.generate(torch.tensor([ids]), max_new_tokens=greedy.max_tokens, do_sample=False, eos_token_id=None)
            scores = self.model(whole, use_cache=False).logits[0].log_softmax(-1)
            tokens = whole[0].tolist()
            entries = [{token: SimpleNamespace(logprob=float(scores[at, token]) + self.off)} for at, token in enumerate(tokens[1:])]
            made = SimpleNamespace(token_ids=tokens[len(ids) :], logprobs=entries[len(ids) - 1 :])
            yield SimpleNamespace(prompt_token_ids=ids, prompt_logprobs=[None, *entries[: len(ids) - 1]], outputs=[made])


@pytest.fixture
def vllm(monkeypatch):
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = StandIn, SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(StandIn, "off", 0.0)


@pytest.mark.parametrize(("off", "code"), [(0.0, 0), (0.5, 1)])
def test_answers_are_compared_and_the_exit_code_says_how(tool, folder, vllm, monkeypatch, capsys, off, code):
    monkeypatch.setattr(StandIn, "off", off)
    assert tool.main([str(folder), "--tokens", "5", "--tp", "2"]) == code
    out = capsys.readouterr().out
    assert out.count("5 of 5") == len(tool.PROMPTS) and ("within" in out) == (code == 0) and ("BEYOND" in out) == (code == 1)
    assert (StandIn.asked["model_impl"], StandIn.asked["tensor_parallel_size"]) == ("transformers", 2)
    assert StandIn.asked["trust_remote_code"] and StandIn.asked["dtype"] == "float32"


def test_the_first_token_that_differs_ends_the_comparison(tool):
    ours = tool.Answer([-1.0, -2.0], [4, 5, 6], [-0.1, -0.2, -0.3])
    theirs = tool.Answer([-1.0, -2.5], [4, 9, 6], [-0.1, -7.0, -0.3])
    assert tool.compared(ours, theirs) == {"prompt": 0.5, "same": 1, "generated": 0.0}
    assert tool.compared(ours, ours) == {"prompt": 0.0, "same": 3, "generated": 0.0}


def test_without_vllm_or_a_folder_it_is_one_line(tool, folder, vllm, monkeypatch, tmp_path, capsys):
    assert tool.main([str(tmp_path)]) == 2
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    assert tool.main([str(folder)]) == 5
    captured = capsys.readouterr()
    assert captured.out == "" and [line.count("; ") for line in captured.err.splitlines()] == [2, 2]


@pytest.mark.parametrize(("name", "word"), [("llama-mha", "attention in every layer; 1 have none"), ("mixtral-gqa", "one width")])
def test_what_the_backend_does_not_take_is_said_before_a_model_is_loaded(tool, vllm, tmp_path, capsys, name, word):
    dense = tiny.model(name)
    layout = with_depth(dense, layout_of_model(dense))
    export(cut(dense, layout, tiny.DEPTH_MASKS["attention"](layout)), tiny.tokenizer(), {}, tmp_path / "model")
    assert tool.main([str(tmp_path / "model")]) == 2
    assert word in capsys.readouterr().err
