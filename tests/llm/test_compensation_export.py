import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tiny_models as tiny
from builders import random_mask, refuses
from exports import label, run_without_ppf
from ppf.errors import DamagedError
from ppf.llm.architectures import layout_of_model
from ppf.llm.auto import register
from ppf.llm.compensation import reader_means
from ppf.llm.export import MODELING_FILE, export
from ppf.llm.load import load_model, model_digest
from ppf.llm.surgery import cut

BLOCKS = tiny.blocks(5, 12, seed=4)
IDS = tiny.blocks(2, 14)
EXPORTS = [*((name, torch.float32) for name in tiny.TINY), *((name, torch.bfloat16) for name in ("llama-biases", "qwen3-gqa"))]
STRANGER = """
import json, sys, torch
sys.modules["ppf"] = None
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

torch.set_num_threads(1)
ids = torch.tensor(json.loads(sys.argv[2]))
for folder in sorted(Path(sys.argv[1]).iterdir()):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="auto")
    hidden = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
    answers = {"logits": model(ids).logits, "hidden": hidden}
    model.save_pretrained(Path(sys.argv[3]) / "again" / folder.name)
    save_file({name: tensor.detach().contiguous() for name, tensor in answers.items()}, f"{sys.argv[3]}/{folder.name}")
"""


def compensated(name="llama-gqa-tied", dtype=torch.float32, filled=True):
    model = tiny.model(name, dtype=dtype)
    layout = layout_of_model(model)
    return cut(model, layout, random_mask(layout, 3), reader_means(model, layout, BLOCKS) if filled else None)


def count(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every case as a folder with its model, and where a process without ppf put its answers."""
    folders, answers, home = (tmp_path_factory.mktemp(name) for name in ("folders", "answers", "home"))
    made = {}
    for case in EXPORTS:
        made[case] = compensated(*case), folders / label(*case), answers
        export(made[case][0], tiny.tokenizer(), {}, made[case][1])
    run_without_ppf(STRANGER, home, folders, json.dumps(IDS.tolist()), answers)
    return made


every = pytest.mark.parametrize("case", EXPORTS, ids=[label(*case) for case in EXPORTS])


@every
@torch.inference_mode()
def test_a_process_without_ppf_answers_bit_for_bit(exported, case):
    model, folder, answers = exported[case]
    theirs, ids = load_file(answers / folder.name), torch.from_numpy(IDS)
    assert tiny.same(theirs["logits"], model(ids).logits, case[0])
    assert tiny.same(theirs["hidden"], model.base_model(ids).last_hidden_state, case[0])
    again = answers / "again" / folder.name  # what it saved in its turn
    assert (again / MODELING_FILE).read_text() == (folder / MODELING_FILE).read_text()
    assert json.loads((again / "config.json").read_text())["reader_bias"] is True
    ours, saved = (load_file(one / "model.safetensors") for one in (folder, again))
    assert ours.keys() == saved.keys() and all(torch.equal(ours[name], saved[name]) for name in ours)


@every
@torch.inference_mode()
def test_a_process_with_ppf_answers_bit_for_bit_and_can_go_on(exported, case):
    register()
    model, folder, _ = exported[case]
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert type(again) is type(model) and tiny.same(tiny.logits(again, IDS), tiny.logits(model, IDS), case[0])
    loaded = load_model(str(folder))
    assert loaded.layout == layout_of_model(model) and loaded.layout.total == count(model)
    assert loaded.digest == model_digest(model)
    mask, fill = random_mask(loaded.layout), reader_means(loaded.model, loaded.layout, BLOCKS)
    assert count(cut(loaded.model, loaded.layout, mask, fill)) == loaded.layout.kept_params(mask.allocation.kept)


@pytest.mark.parametrize("biased", [True, False])
def test_biases_that_the_config_denies_or_invents_are_refused(tmp_path, biased):
    export(compensated(filled=biased), tiny.tokenizer(), {}, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text()) | {"reader_bias": not biased}
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with refuses(DamagedError):
        load_model(str(tmp_path / "out"))
