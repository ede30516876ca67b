import json

import pytest
import torch

import ppf
import tiny_models
from builders import refuses
from ppf import cli
from ppf.config import PlanTarget, PruneConfig, Target
from ppf.errors import DamagedError, InputError
from ppf.llm.load import load_model
from ppf.llm.masking import masked
from ppf.progress import Progress
from ppf.recipes.apply_plan import apply_plan, prune_by_plan
from ppf.space.plan import mask_of


def wish(place, plan, **other):
    grid = {name: other.pop(name) for name in ("align", "tp") if name in other}
    return PruneConfig(str(place / "model"), other.pop("out", "out"), PlanTarget(**grid), plan=str(plan), **other)


@pytest.fixture(scope="module")
def exported(fitted, tmp_path_factory):
    """An export from the study, compensated by nothing."""
    folder = tmp_path_factory.mktemp("exported") / "first"
    fitted.prune(ratio=0.4, device="cpu").save_pretrained(folder)
    return folder


def test_a_plan_applied_is_the_export_that_it_came_from(place, exported, tmp_path, capsys):
    code = cli.main(["prune", str(place / "model"), "--plan", str(exported / "ppf.json"), "--out", str(tmp_path / "out")])
    captured = capsys.readouterr()
    assert code == 0 and "warning" not in captured.err and "not measured" in captured.out
    for name in ("model.safetensors", "config.json", "modeling_ppf.py"):
        assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes(), name
    first, second = (json.loads((folder / "ppf.json").read_text()) for folder in (exported, tmp_path / "out"))
    for name in ("mask", "policy", "layout", "kept", "params", "format"):
        assert first[name] == second[name]
    assert second["ratio"]["met"] == first["ratio"]["met"] and second["from"]["same_model"]
    assert prune_by_plan(wish(place, tmp_path / "out" / "ppf.json", out=str(tmp_path / "again")), Progress(True))["from"] == {
        "kind": "export", "same_model": True, "compensated": False,
    }  # fmt: skip


def test_a_fine_tune_is_cut_alike_and_it_is_said(place, exported, tmp_path, capsys):
    tiny_models.save(tmp_path / "tuned", "llama-mha", seed=5)
    command = ["prune", str(tmp_path / "tuned"), "--plan", str(exported / "ppf.json"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 0 and "another model of this layout" in capsys.readouterr().err
    dense, smaller = load_model(str(tmp_path / "tuned")), load_model(str(tmp_path / "out"))
    with masked(dense.model, dense.layout, mask_of(json.loads((exported / "ppf.json").read_text()), dense.layout)):
        expected = tiny_models.logits(dense.model, tiny_models.blocks(2))
    torch.testing.assert_close(tiny_models.logits(smaller.model, tiny_models.blocks(2)), expected, rtol=0, atol=1e-5)


def test_another_layout_is_refused_and_nothing_is_written(exported, tmp_path, capsys):
    tiny_models.save(tmp_path / "other", "llama-gqa-tied")
    command = ["prune", str(tmp_path / "other"), "--plan", str(exported / "ppf.json"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 4
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "this shape" in error.splitlines()[-1] and not (tmp_path / "out").exists()


def test_a_study_is_no_model_for_a_plan(exported, fitted, tmp_path, capsys):
    command = ["prune", str(fitted.folder), "--plan", str(exported / "ppf.json"), "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "is a study" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_plan_in_python_is_the_plan_of_the_command(exported, place):
    model = place / "model"
    again = ppf.apply_plan(model, exported / "ppf.json", device="cpu")
    assert again.plan["mask"] == json.loads((exported / "ppf.json").read_text())["mask"] and again.decision is None
    ratios = ppf.apply_plan(load_model(str(model)).model, [0.1, 0.3, 0.5], tokenizer=tiny_models.tokenizer(), align=8, device="cpu")
    kept = [entry["kept"] for entry in ratios.plan["kept"] if entry["kind"] == "ffn"]
    assert all(count % 8 == 0 for count in kept) and ratios.plan["ratio"]["met"] >= 0.3
    with refuses(InputError):
        ppf.apply_plan(model, [0.1, 0.3], device="cpu")
    with refuses(InputError):
        ppf.apply_plan(model, [0.1, 0.3, 0.5], compensate="ridge", device="cpu")


@pytest.mark.parametrize("text", [None, "text.txt"])
def test_ratios_of_another_tool_are_met_exactly(place, text):
    loaded = load_model(str(place / "model"))
    layout = loaded.layout
    pruned = apply_plan([0.1, 0.3, 0.5], loaded, wish(place, "x", text=text and str(place / text)), Progress(True))
    params = sum(parameter.numel() for parameter in pruned.model.parameters())
    assert 0 <= layout.total - params - 0.3 * layout.prunable < layout.costs.min()
    kept = [entry["kept"] / entry["of"] for entry in pruned.plan["kept"] if entry["kind"] == "ffn"]
    assert kept == sorted(kept, reverse=True) and pruned.plan["importance"]["method"] == ("taylor" if text else "magnitude")
    assert ("measured" in pruned.plan) == bool(text) and pruned.decision is None


def test_what_ratios_ask_for_is_told_beside_what_a_grid_lets_go(place, tmp_path, capsys):
    (tmp_path / "ratios.json").write_text("[0.1, 0.1, 0.1]")
    command = ["prune", str(place / "model"), "--plan", str(tmp_path / "ratios.json"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--align", "8"]) == 0
    met = json.loads((tmp_path / "out" / "ppf.json").read_text())["ratio"]["met"]
    assert f"asked 0.1000, met {met:.4f} of" in capsys.readouterr().out and met > 0.1


def test_ratios_keep_to_the_grid(place):
    pruned = apply_plan([0.25] * 3, load_model(str(place / "model")), wish(place, "x", align=8, tp=2), Progress(True))
    assert all(entry["kept"] % (2 if entry["kind"] == "attn" else 8) == 0 for entry in pruned.plan["kept"])


def test_a_plan_may_be_compensated(place, exported):
    record = json.loads((exported / "ppf.json").read_text())
    loaded = load_model(str(place / "model"))
    config = wish(place, "x", text=str(place / "text.txt"), compensate="ridge")
    ridge, plain = apply_plan(record, loaded, config, Progress(True)), apply_plan(record, loaded, wish(place, "x"), Progress(True))
    assert ridge.plan["compensation"]["method"] == "ridge" and ridge.plan["mask"] == plain.plan["mask"] == record["mask"]
    assert not torch.equal(ridge.model.model.layers[2].mlp.down_proj.weight, plain.model.model.layers[2].mlp.down_proj.weight)


def test_a_grid_does_not_fit_the_plan_of_an_export(place, exported):
    record = json.loads((exported / "ppf.json").read_text())
    for grid in ({"tp": 2}, {"align": 8}):
        with refuses(InputError):
            apply_plan(record, load_model(str(place / "model")), wish(place, "x", **grid), Progress(True))


@pytest.mark.parametrize("idle", [{"device": "cpu"}, {"align": 32, "gguf": "f"}, {"tp": 2}])
def test_what_would_do_nothing_beside_the_plan_of_an_export_is_refused(place, exported, tmp_path, idle):
    idle = idle | ({"gguf": str(tmp_path / "f")} if "gguf" in idle else {})
    with refuses(InputError) as caught:
        prune_by_plan(wish(place, exported / "ppf.json", out=str(tmp_path / "out"), **idle), Progress(True))
    assert f"--{next(iter(idle))}" in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--plan p.json --ratio 0.3", "--ratio"),
        ("--plan p.json --refine", "--refine"),
        ("--plan p.json --nested", "--nested"),
        ("--plan p.json --model m", "--model"),
        ("--plan p.json --compensate ridge", "--text"),
        ("--text pydocs --ratio 0.3", "--text must come with --plan"),
        ("--compensate prayer --ratio 0.3", "prayer"),
        ("", "exactly one of --ratio, --params and --memory"),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys, options, words):
    assert cli.main(["prune", "s", "--out", "o", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and error.count("; ") >= 2


def test_without_a_plan_the_target_is_a_plain_one():
    assert type(PruneConfig("s", "o", Target(ratio=0.3)).target) is Target


def test_a_pruned_model_has_another_layout(exported, tmp_path):
    target = wish(exported, "x").target
    with refuses(DamagedError):
        prune_by_plan(PruneConfig(str(exported), str(tmp_path / "o"), target, plan=str(exported / "ppf.json")), Progress(True))


@pytest.mark.parametrize("shown", [[], ["--json"]])
def test_ratios_from_a_table_are_measured_where_there_is_a_text(place, tmp_path, capsys, shown):
    (tmp_path / "ratios.csv").write_text("layer,attn,ffn\n0,0,0.5\n1,0.25,0.5\n2,0.25,0.5\n")
    command = ["prune", str(place / "model"), "--plan", str(tmp_path / "ratios.csv"), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--text", str(place / "long.txt"), "--device", "cpu", *shown]) == 0
    out, plan = capsys.readouterr().out, json.loads((tmp_path / "out" / "ppf.json").read_text())
    assert plan["measured"]["ppl"] > 1 and plan["protocol"]["text"] == "long.txt" and str(tmp_path) not in json.dumps(plan)
    assert [entry["kept"] for entry in plan["kept"]] == [4, 20, 3, 20, 3, 20]
    if shown:
        record = json.loads(out)
        assert record["measured"] == plan["measured"] and record["out"] == str(tmp_path / "out") and "mask" not in record
    else:
        assert f"measured {plan['measured']['ppl']:.2f}" in out and "long.txt" in out


def test_a_damaged_plan_is_one_line(place, tmp_path, capsys):
    (tmp_path / "plan.json").write_text('{"mask": [')
    code = cli.main(["prune", str(place / "model"), "--plan", str(tmp_path / "plan.json"), "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert code == 4 and error.count("\n") == 1 and error.startswith("error: ") and not (tmp_path / "out").exists()
