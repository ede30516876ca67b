import json
import shutil
from weakref import ref

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import ppf
import tiny_models
from builders import refuses
from ppf import cli
from ppf.config import EvalConfig, Target
from ppf.decide import Decider
from ppf.errors import DamagedError, InputError, ResourceError
from ppf.llm import export, placement
from ppf.llm.load import adopt_model, load_model
from ppf.llm.masking import masked
from ppf.llm.text import Text
from ppf.progress import Progress
from ppf.recipes.evaluate import evaluate
from ppf.recipes.prune import check_out, prune, tokens_per_second


@pytest.mark.parametrize("ratio", [0.0, 0.2, 0.5, 0.8])
def test_a_pruned_model_is_as_small_as_asked_and_measured_truly(fitted, ratio):
    pruned = fitted.prune(ratio=ratio, device="cpu")
    layout = Decider(fitted.folder).layout
    params = sum(parameter.numel() for parameter in pruned.model.parameters())
    assert params == pruned.plan["params"]["after"] == pruned.decision.params[1]
    met = (layout.total - params) / layout.prunable
    assert pruned.plan["ratio"]["met"] == pytest.approx(met) and ratio <= met < ratio + layout.costs.min() / layout.prunable
    text = Text.load(fitted.folder / "text.safetensors", layout.fingerprint).test
    losses = [
        torch.nn.functional.cross_entropy(tiny_models.logits(pruned.model, row[None])[0, :-1], torch.from_numpy(row[1:])).item()
        for row in text
    ]
    assert pruned.plan["measured"]["log_ppl"] == pytest.approx(np.mean(losses), abs=1e-5)
    lost, dense = pruned.plan["measured"]["above_dense"], pruned.plan["dense"]["log_ppl"]
    assert lost["log_ppl"] == pytest.approx(np.mean(losses) - dense, abs=1e-5)
    assert lost["interval"][0] <= lost["log_ppl"] <= lost["interval"][1]


def test_nothing_pruned_is_the_dense_model(fitted):
    pruned = fitted.prune(ratio=0.0, device="cpu")
    assert pruned.plan["measured"]["log_ppl"] == pytest.approx(pruned.plan["dense"]["log_ppl"], abs=1e-6)
    assert pruned.plan["predicted"]["log_ppl"] == pytest.approx(pruned.plan["dense"]["log_ppl"], abs=1e-2)


def test_nested_models_lose_what_was_lost_before_and_say_that_they_are_nested(fitted):
    found = [fitted.prune(ratio=ratio, nested=True, device="cpu") for ratio in (0.3, 0.5)]
    for bits, fewer in zip(*(pruned.decision.mask.bits for pruned in found), strict=True):
        assert not (fewer & ~bits).any()
    assert [pruned.plan["nested"] for pruned in found] == [True, True]
    assert not fitted.prune(ratio=0.3, device="cpu").plan["nested"]
    kept = fitted.policy(ratio=0.3, nested=True).allocation.kept
    np.testing.assert_array_equal(kept, found[0].decision.allocation.kept)


def test_nested_models_are_not_refined(fitted):
    with refuses(InputError):
        fitted.prune(ratio=0.3, nested=True, refine=True)
    with refuses(InputError):
        prune(fitted.folder, fitted._loaded, Target(ratio=0.3, nested=True), "cpu", 4, Progress(quiet=True))


def test_what_is_saved_answers_as_the_model_in_memory(fitted, tmp_path):
    pruned = fitted.prune(ratio=0.4, device="cpu")
    size = pruned.save_pretrained(tmp_path / "out")
    assert size == (tmp_path / "out" / "model.safetensors").stat().st_size
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = tiny_models.blocks(2)
    assert torch.equal(tiny_models.logits(again, ids), tiny_models.logits(pruned.model, ids))
    plan = json.loads((tmp_path / "out" / "ppf.json").read_text())
    assert plan == pruned.plan and plan["layout"] == Decider(fitted.folder).layout.fingerprint
    dense = tiny_models.model("llama-mha")
    with masked(dense, Decider(fitted.folder).layout, pruned.decision.mask):
        assert torch.allclose(tiny_models.logits(dense, ids), tiny_models.logits(again, ids), atol=1e-5)
    record = evaluate(EvalConfig(str(tmp_path / "out"), "pydocs", seq_len=16, tokens=64), load_model(str(tmp_path / "out")))
    assert set(record) == {"ppl", "log_ppl", "interval", "tokens", "protocol"} and record["ppl"] == pytest.approx(
        np.exp(record["log_ppl"])
    )


def test_the_plan_holds_the_mask(fitted):
    pruned = fitted.prune(ratio=0.3, device="cpu")
    for packed, bits in zip(pruned.plan["mask"], pruned.decision.mask.bits, strict=True):
        unpacked = np.unpackbits(np.frombuffer(bytes.fromhex(packed), dtype=np.uint8))[: len(bits)]
        assert (unpacked.astype(bool) == bits).all()


def test_sizes_may_be_said_in_other_words(fitted):
    layout = Decider(fitted.folder).layout
    asked = layout.total - layout.prunable // 3
    by_params = fitted.policy(params=str(asked))
    by_memory = fitted.policy(memory=f"{asked * 4 + 2048 * (layout.layers + 2)}B")
    assert by_params.params[1] <= asked and by_params.params[1] > asked - layout.costs.min()
    assert (by_params.allocation.kept == by_memory.allocation.kept).all()


def test_refining_measures_candidates_and_chooses_a_measured_one(fitted, tmp_path):
    folder = shutil.copytree(fitted.folder, tmp_path / "study")  # what is measured here must teach no other test
    fitted = ppf.Study(folder, tiny_models.model("llama-mha"), tiny_models.tokenizer())
    refined = fitted.prune(ratio=0.45, refine=True, candidates=6, device="cpu")
    store = Decider(fitted.folder).study.store()
    candidates = [one for one in store.all("refine") if one.ratio == 0.45]
    assert 2 <= len(candidates) <= 6 and refined.plan["refined"]
    measured = {one.kept for one in store.all()}
    assert {tuple(of.allocation.kept.tolist()) for of in (refined.decision, fitted.policy(ratio=0.45))} <= measured
    assert refined.decision.met >= 0.45


@pytest.mark.parametrize("where", ["", "..", "."])
def test_an_output_folder_never_takes_the_study_with_it(fitted, where):
    with refuses(InputError):
        check_out(str(fitted.folder / where), True, fitted.folder)
    pruned = fitted.prune(ratio=0.3, device="cpu")
    before = sorted(fitted.folder.parent.rglob("*"))
    with refuses(InputError):
        pruned.save_pretrained(fitted.folder / where, force=True)
    assert sorted(fitted.folder.parent.rglob("*")) == before


def test_an_export_says_nothing_of_the_machine(fitted):
    assert str(fitted.folder.parent) not in json.dumps(fitted.prune(ratio=0.3, device="cpu").plan)


def test_a_study_of_another_model_is_refused(fitted):
    other = adopt_model(tiny_models.model("llama-mha", seed=1), tiny_models.tokenizer())
    with refuses(DamagedError):
        prune(fitted.folder, other, Target(ratio=0.3), "cpu", 0, Progress(quiet=True))


@pytest.mark.parametrize(
    "wish", [{"ratio": 0.9999}, {"ratio": -0.1}, {"ratio": float("nan")}, {"params": "10"}, {"memory": "1KB"}, {}]
)
def test_a_size_that_cannot_be_is_refused_before_the_model_is_loaded(fitted, wish):
    study = ppf.Study(fitted.folder)
    with refuses(InputError):
        study.prune(**wish)
    assert study._loaded is None


def test_an_export_that_fails_its_check_leaves_nothing(fitted, tmp_path, monkeypatch):
    def broken(model, folder):
        raise DamagedError("the exported folder must load; it does not: test; nothing was written")

    monkeypatch.setattr(export, "verify", broken)
    with refuses(DamagedError):
        fitted.prune(ratio=0.3, device="cpu").save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_speed_is_that_of_each_model():
    models = [tiny_models.model("llama-mha"), tiny_models.model("llama-mha", 1)]
    speeds = tokens_per_second(models, tiny_models.blocks(8, 16))
    assert len(speeds) == 2 and min(speeds) > 0


@pytest.mark.parametrize("refine", [{}, {"refine": True, "candidates": 2}], ids=["taken", "refined"])
def test_limits_are_never_filled_by_two_models(fitted, tmp_path, monkeypatch, refine):
    """Nor when it is asked again and other limits are found, as ``split`` may."""
    study = ppf.Study(shutil.copytree(fitted.folder, tmp_path / "s"), tiny_models.model("llama-mha"), tiny_models.tokenizer())
    spread, made, most = placement.spread, [], []

    def counted(*arguments):
        found = spread(*arguments)
        made.append(ref(found))
        most.append(sum(one() is not None for one in made))
        return found

    monkeypatch.setattr(placement, "spread", counted)
    figures = [study.prune(ratio=0.4, device=device, **refine).plan["measured"] for device in ("cpu=1KB", "cpu=2KB")]
    assert len(made) >= 4 and set(most) == {1} and figures[0] == figures[1]


def test_a_wanted_size_holds_the_whole_file(fitted, tmp_path):
    layout = Decider(fitted.folder).layout
    wanted = 4 * (layout.total - layout.prunable // 3) + 2048 * (layout.layers + 2)
    pruned = fitted.prune(memory=f"{wanted}B", device="cpu")
    assert 0.8 * wanted < pruned.save_pretrained(tmp_path / "out") <= wanted


@pytest.mark.parametrize("where", ["file/out", "file/deep/out"])
def test_a_place_that_cannot_be_is_refused_before_the_work(fitted, tmp_path, where):
    (tmp_path / "file").write_text("x")
    with refuses(InputError):
        check_out(str(tmp_path / where), False, fitted.folder)


def test_a_place_that_cannot_be_written_is_refused_before_the_work(fitted):
    with refuses(ResourceError):
        check_out("/proc/out", False, fitted.folder)


def test_without_measuring_the_checkpoint_is_the_same_and_no_model_is_loaded(place, fitted, tmp_path, capsys, monkeypatch):
    fitted.prune(ratio=0.3, device="cpu").save_pretrained(tmp_path / "measured")
    monkeypatch.setattr("ppf.recipes.lab.load_model", None)
    command = ["prune", str(fitted.folder), "--ratio", "0.3", "--model", str(place / "model"), "--no-measure"]
    assert cli.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "not measured" in capsys.readouterr().out
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "measured" / name).read_bytes()
    plans = [json.loads((tmp_path / name / "ppf.json").read_text()) for name in ("out", "measured")]
    assert set(plans[1]) - set(plans[0]) == {"measured", "tokens_per_second"}
    assert plans[0]["mask"] == plans[1]["mask"] and plans[0]["protocol"] == plans[1]["protocol"]
    for wish in (["--refine"], ["--compensate", "ridge"], ["--gguf", "x.gguf"]):
        assert cli.main([*command, *wish, "--out", str(tmp_path / "other")]) == 2
