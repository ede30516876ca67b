import json
import shutil
import sys

import numpy as np
import pytest
import torch

import ppf
import tiny_models
from builders import interrupted, names_in, refuses
from ppf import cli
from ppf.config import RecoverConfig
from ppf.decide import Decider
from ppf.errors import DamagedError, InputError, ResourceError, UnsupportedError
from ppf.llm import recover as training
from ppf.llm.architectures import layout_of_model
from ppf.llm.export import export
from ppf.llm.load import adopt_model, load_model
from ppf.llm.scores import score_units
from ppf.llm.surgery import cut
from ppf.llm.text import take_blocks, whole_text
from ppf.progress import Progress
from ppf.recipes import recover as recipe
from ppf.recipes.recover import precision, recover_folder
from ppf.recipes.teacher import find_teacher, plan_of
from ppf.space.allocation import allocate
from ppf.space.budget import Budget
from ppf.space.mask import select
from ppf.space.policy import Policy

SHORT = ["--tokens", "640", "--batch", "64", "--seq-len", "16", "--test-tokens", "512", "--device", "cpu"]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pruned(fitted, tmp_path_factory):
    """An export from the study; not to be changed."""
    folder = tmp_path_factory.mktemp("pruned") / "small"
    fitted.prune(ratio=0.5, device="cpu").save_pretrained(folder)
    return folder


@pytest.fixture
def small(pruned, place, tmp_path):
    """A copy of it that says where its dense model lies."""
    folder = shutil.copytree(pruned, tmp_path / "small")
    plan = json.loads((folder / "ppf.json").read_text())
    plan["model"]["name"] = str(place / "model")
    (folder / "ppf.json").write_text(json.dumps(plan))
    return folder


def answer(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# --- what it does ---


@pytest.mark.parametrize("how", [["--lora-rank", "4"], ["--full"]], ids=["lora", "full"])
def test_a_folder_is_recovered_beside_its_dense_model(capsys, small, place, tmp_path, how):
    before, dense = files(small), files(place / "model")
    given = ["recover", small, "--text", place / "text.txt", *SHORT, "--lr", 0.005, *how]
    code, out, err = answer(capsys, *given, "--json")
    record = json.loads(out)
    folder = tmp_path / "small-recovered"
    assert code == 0 and record["out"] == str(folder) and names_in(tmp_path) == ["small", "small-recovered"]
    assert files(small) == before and files(place / "model") == dense  # what it was made from stays
    assert set(files(folder)) == set(before) and files(folder)["config.json"] == before["config.json"]
    assert record["gain"]["log_ppl"] == pytest.approx(record["before"]["log_ppl"] - record["after"]["log_ppl"])
    low, high = record["gain"]["interval"]
    assert low <= record["gain"]["log_ppl"] <= high
    assert (record["method"], record["rank"]) == (("lora", 4) if how[0] == "--lora-rank" else ("full", None))
    assert (record["tokens"], record["steps"], record["batch"], record["lr"]) == (640, 10, 64, 0.005)
    plan, old = (json.loads((one / "ppf.json").read_text()) for one in (folder, small))
    recovered = plan.pop("recovered")
    assert plan == old and recovered["teacher"] == {"name": "model", "digest": old["model"]["digest"]}
    assert recovered == {key: value for key, value in record.items() if key not in ("params", "bytes", "out")}
    assert not any(str(place).encode() in data for name, data in files(folder).items() if name != "ppf.json")


def test_the_figures_are_those_of_the_study_and_of_the_files(capsys, small, place, tmp_path):
    code, out, _ = answer(capsys, "recover", small, "--text", place / "text.txt", *SHORT, "--out", tmp_path / "out", "--json")
    record, plan = json.loads(out), json.loads((small / "ppf.json").read_text())
    assert record["before"]["log_ppl"] == pytest.approx(plan["measured"]["log_ppl"], abs=1e-5)
    assert record["dense"]["log_ppl"] == pytest.approx(plan["dense"]["log_ppl"], abs=1e-5)
    assert record["protocol"] == {"text": "text.txt", "seq_len": 16, "tokens": 512, "dtype": "float32"}
    again = load_model(str(tmp_path / "out"))
    code, out, _ = answer(capsys, "recover", tmp_path / "out", "--text", place / "text.txt", *SHORT, "--json")
    second = json.loads(out)  # of a folder that was recovered before
    assert second["before"]["log_ppl"] == pytest.approx(record["after"]["log_ppl"], abs=1e-5)
    kept = json.loads((tmp_path / "out-recovered" / "ppf.json").read_text())["recovered"]
    assert kept["earlier"] == [json.loads((tmp_path / "out" / "ppf.json").read_text())["recovered"]]
    assert again.layout == load_model(str(tmp_path / "out-recovered")).layout == load_model(str(small)).layout


def test_what_it_is_tested_on_is_never_trained_on(small, place, monkeypatch):
    rows = {"train": set(), "evaluate": set()}

    def watched(name, place_of_blocks):
        real = getattr(recipe, name)

        def call(*arguments):
            rows[name] |= {tuple(row) for row in arguments[place_of_blocks]}
            return real(*arguments)

        monkeypatch.setattr(recipe, name, call)

    watched("train", 2)
    watched("evaluate", 1)
    config = RecoverConfig(str(small), text=str(place / "text.txt"), seq_len=16, tokens=10**4, batch=500, device="cpu")
    record = recover_folder(config, Progress(True))
    everything = {tuple(row) for row in take_blocks(whole_text(config.text, tiny_models.tokenizer()), 16, None, 0, "")}
    assert not rows["train"] & rows["evaluate"] and rows["train"] | rows["evaluate"] == everything
    assert len(rows["train"]) == record["distinct_tokens"] / 16 and len(rows["evaluate"]) == record["protocol"]["tokens"] / 16
    assert record["tokens"] == 496 * 20 and 0.35 < len(rows["evaluate"]) / len(everything) < 0.45


def test_a_large_vocabulary_goes_through_in_small_parts(small, place, monkeypatch):
    hows, train = [], recipe.train

    def watched(model, layout, blocks, dense, how, advance):
        hows.append(how)
        return train(model, layout, blocks, dense, how, advance)

    monkeypatch.setattr(recipe, "train", watched)
    config = RecoverConfig(str(small), text=str(place / "text.txt"), tokens=640, batch=64, seq_len=16, device="cpu", force=True)
    first = recover_folder(config, Progress(True))
    monkeypatch.setattr(recipe, "_MOST_LOGITS", 2 * 16 * tiny_models.VOCAB)
    second = recover_folder(config, Progress(True))
    assert [how.at_once for how in hows] == [64, 2]
    assert second["after"]["log_ppl"] == pytest.approx(first["after"]["log_ppl"], abs=1e-4)


def test_it_can_learn_from_what_the_dense_model_writes(small, place):
    config = RecoverConfig(str(small), text="self", test_text=str(place / "text.txt"), tokens=320, seq_len=16, device="cpu")
    record = recover_folder(config, Progress(True))
    assert record["text"] == "self" and record["protocol"]["text"] == "text.txt" and record["steps"] == 20


def test_another_text_can_be_tested_on(capsys, small, place):
    given = ["--text", place / "text.txt", "--test-text", place / "long.txt", *SHORT]
    code, out, _ = answer(capsys, "recover", small, *given)
    assert code == 0 and "long.txt, 512 tokens" in out and "640 tokens, drawn from " in out and " of text.txt, " in out
    assert "teacher" in out and "before" in out and "after" in out and "learnt from model" in out


def test_without_a_dense_model_the_text_alone_is_learnt(capsys, small, place):
    (small / "ppf.json").unlink()
    code, out, _ = answer(capsys, "recover", small, "--text", place / "text.txt", *SHORT)
    assert code == 0 and "the text alone" in out and "\ndense" not in out and "damage" not in out
    assert json.loads((small.parent / "small-recovered" / "ppf.json").read_text())["recovered"]["teacher"] is None


def test_a_dense_model_can_be_trained_too_and_needs_no_code(place, tmp_path):
    config = RecoverConfig(
        str(place / "model"), str(tmp_path / "out"), str(place / "text.txt"), tokens=320, seq_len=16, test_tokens=256, device="cpu"
    )
    record = recover_folder(config, Progress(True))
    assert record["teacher"] is None and "modeling_ppf.py" not in names_in(tmp_path / "out")
    assert type(load_model(str(tmp_path / "out")).model).__name__ == "LlamaForCausalLM"


def test_the_weights_keep_the_dtype_of_the_checkpoint(place, tmp_path):
    dense = tiny_models.save(tmp_path / "dense", "qwen3-gqa", dtype=torch.bfloat16)
    model = tiny_models.model("qwen3-gqa", dtype=torch.bfloat16)
    layout = layout_of_model(model)
    mask = select(allocate(Policy.uniform(layout), Budget.from_ratio(0.4, layout), layout), _order(model, layout), layout)
    export(cut(model, layout, mask), tiny_models.tokenizer(), {}, tmp_path / "small")
    for more in ({}, {"full": True}, {"dtype": "bfloat16"}):
        config = RecoverConfig(
            str(tmp_path / "small"), text=str(place / "text.txt"), teacher=str(dense), tokens=320, seq_len=16, test_tokens=256,
            device="cpu", force=True, **more,
        )  # fmt: skip
        recover_folder(config, Progress(True))
        assert load_model(str(tmp_path / "small-recovered")).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "device", "checkpoint", "expected"),
    [
        ("auto", "cpu", "bfloat16", "float32"), ("auto", "cuda", "bfloat16", "bfloat16"), ("auto", "cuda", "float16", "bfloat16"),
        ("float32", "cuda", "bfloat16", "float32"), ("bfloat16", "cpu", "float32", "bfloat16"),
    ],
)  # fmt: skip
def test_gradients_are_never_computed_in_float16(name, device, checkpoint, expected):
    assert precision(name, torch.device(device), getattr(torch, checkpoint)) == getattr(torch, expected)


def _order(model, layout):
    return score_units(model, layout, np.zeros((0, 1), dtype=np.int64), "magnitude", "", 0)


def test_the_embedded_model_without_half_of_it_gets_better():
    loaded = load_model("ref-a")
    layout = loaded.layout
    mask = select(allocate(Policy.uniform(layout), Budget.from_ratio(0.5, layout), layout), _order(loaded.model, layout), layout)
    small = cut(loaded.model, layout, mask)
    settings = {"tokens": 9000, "batch": 384, "seq_len": 64, "test_tokens": 2048, "device": "cpu"}
    recovered = ppf.recover(small, teacher="ref-a", tokenizer=loaded.tokenizer, **settings)
    found = recovered.plan["recovered"]
    assert found["gain"]["interval"][0] > 0.1 and found["share"] > 0.2
    assert found["dense"]["log_ppl"] < found["after"]["log_ppl"] < found["before"]["log_ppl"]


# --- in Python ---


def test_in_python_it_is_one_call_after_the_other(fitted, place, tmp_path):
    pruned = fitted.prune(ratio=0.5, device="cpu")
    before = {name: tensor.clone() for name, tensor in pruned.model.state_dict().items()}
    settings = {"text": place / "text.txt", "tokens": 640, "seq_len": 16, "test_tokens": 512, "device": "cpu"}
    recovered = ppf.recover(pruned, teacher=tiny_models.model("llama-mha"), lora_rank=4, **settings)
    assert all(torch.equal(tensor, before[name]) for name, tensor in pruned.model.state_dict().items())
    assert not any(parameter.grad is not None for parameter in pruned.model.parameters())
    recovered.save_pretrained(tmp_path / "out")
    by_path = ppf.recover(tmp_path / "out", teacher=place / "model", **settings)
    assert by_path.plan["recovered"]["earlier"][0]["rank"] == 4
    assert by_path.plan["recovered"]["before"]["log_ppl"] == pytest.approx(
        recovered.plan["recovered"]["after"]["log_ppl"], abs=1e-5
    )
    again = ppf.recover(pruned, teacher=tiny_models.model("llama-mha"), lora_rank=4, **settings)
    same = again.model.state_dict()
    assert all(torch.equal(tensor, same[name]) for name, tensor in recovered.model.state_dict().items())
    with refuses(InputError):
        ppf.recover(pruned, ranks=3)


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "code", "words_in"),
    [
        ("{tmp}/none", 2, "is none"),
        ("{small} --text {tmp}/none.txt", 2, "none.txt"),
        ("{small} --text self --teacher none", 2, "self"),
        ("{small} --out {small}", 2, "must not be"),
        ("{small} --out {tmp}", 2, "must not be"),
        ("{small} --out {small}/below", 2, "outside"),
        ("{small} --out {tmp}/full", 2, "not empty"),
        ("{small} --out {model} --force", 2, "must hold ppf.json"),
        ("{small} --teacher {tmp}/none", 2, "is none"),
        ("{small} --teacher ref-a", 2, "vocabulary"),
        ("{small} --device abacus", 2, "--device"),
        ("{small} --device cpu=1GB", 2, "training"),
        ("{small} --seq-len 4096", 2, "--seq-len"),
        ("{small} --lr 1e30", 2, "--lr"),
        ("{small} --lr 1e30 --full", 2, "--lr"),
        ("ref-a", 2, "--out"),
        ("{nameless}", 2, "--teacher"),
        ("{changed}", 4, "another by now"),
        ("{broken}", 4, "JSON object"),
        ("{gpt2} --out {tmp}/out", 3, "gpt2"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(capsys, small, place, tmp_path, arguments, code, words_in):
    names = {name: shutil.copytree(small, tmp_path / name) for name in ("nameless", "changed", "broken")}
    plan = json.loads((small / "ppf.json").read_text())
    for name, model in {"nameless": {**plan["model"], "name": "elsewhere"}, "changed": {**plan["model"], "digest": "0"}}.items():
        (names[name] / "ppf.json").write_text(json.dumps({**plan, "model": model}))
    (names["broken"] / "ppf.json").write_text('{"ratio": NaN}')
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    line = arguments.format(tmp=tmp_path, small=small, model=place / "model", gpt2=tmp_path / "gpt2", **names)
    defaults = [*SHORT, *([] if "--text" in line else ["--text", str(place / "text.txt")])]
    given = [flag for flag in _pairs(defaults) if flag[0] not in line.split()]
    found, out, err = answer(capsys, "recover", *line.split(), *(part for flag in given for part in flag))
    last = err.splitlines()[-1]
    assert (found, out) == (code, "") and last.startswith("error: ") and words_in in last and last.count("; ") >= 2
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def _pairs(options):
    return list(zip(options[::2], options[1::2], strict=True))


def test_ctrl_c_leaves_nothing_half_written(capsys, small, place, monkeypatch):
    for owner, name in ((training, "_backward"), (recipe.Pruned, "save_pretrained")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            code, out, err = answer(capsys, "recover", small, "--text", place / "text.txt", *SHORT)
        assert code == 130 and out == "" and err.splitlines()[-1].startswith("error: stopped; ")
        assert names_in(small.parent) == ["small"]


def test_a_missing_package_is_said_before_a_model_is_loaded(capsys, small, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(recipe, "load_for", interrupted)
    code, _, err = answer(capsys, "recover", small)
    assert code == ResourceError.exit_code and "ppf[recover]" in err


def test_a_teacher_by_name_is_not_held_to_the_plan(small, place):
    plan = {**plan_of(small), "model": {"name": "gone", "digest": "0"}}
    assert find_teacher(str(place / "model"), plan, Progress(True)).folder == place / "model"
    assert find_teacher("none", plan, Progress(True)) is None and find_teacher(None, {}, Progress(True)) is None
    for model in ({"name": "gone"}, {"name": 3}, "ref-a", None):
        with refuses(InputError):
            find_teacher(None, {"model": model}, Progress(True))
    with refuses(DamagedError):
        find_teacher(None, {"model": {"name": "ref-a", "digest": None}}, Progress(True))


def test_a_model_that_answers_nothing_finite_is_not_trained(place, tmp_path):
    model = tiny_models.model("llama-mha")
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with refuses(DamagedError):
        ppf.recover(model, tokenizer=tiny_models.tokenizer(), text=place / "text.txt", tokens=64, seq_len=16, device="cpu")


def test_only_a_whole_causal_lm_is_trained():
    with refuses(UnsupportedError):
        ppf.recover(tiny_models.model("llama-mha").model, tokenizer=tiny_models.tokenizer())


def test_the_layout_of_the_study_is_not_needed(fitted, place, tmp_path):
    loaded = adopt_model(fitted.prune(ratio=0.3, device="cpu").model, tiny_models.tokenizer())
    assert loaded.layout != Decider(fitted.folder).layout
    (tmp_path / "other.txt").write_text((place / "long.txt").read_text()[:3000])
    config = RecoverConfig("", text=str(tmp_path / "other.txt"), tokens=64, seq_len=16, device="cpu")
    assert recipe.recover(config, loaded, {}, None, Progress(True)).plan["recovered"]["steps"] == 4
