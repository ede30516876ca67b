import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import GGUFReader

import gguf_builders as builders
import ppf
import tiny_models
from builders import copied, names_in, refuses
from ppf import cli
from ppf.config import ExportConfig, PruneConfig, Target
from ppf.decide import Decider
from ppf.errors import InputError, ResourceError, UnsupportedError
from ppf.llm import gguf_check
from ppf.llm.depth import with_depth
from ppf.llm.gguf import write_gguf
from ppf.llm.load import adopt_model, load_model, open_checkpoint
from ppf.llm.stored import Stored
from ppf.recipes.export import check_wish, export
from ppf.recipes.prune import Pruned
from ppf.space.allocation import Allocation


@pytest.fixture(autouse=True)
def without_llama_cpp(monkeypatch):
    monkeypatch.setattr(gguf_check, "has_llama_cpp", lambda: False)


def answer(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dense model with a tokenizer that llama.cpp knows."""
    to = tmp_path_factory.mktemp("models") / "plain"
    builders.model("llama-mha").save_pretrained(to)
    builders.byte_level("qwen2").save_pretrained(to)
    return to


@pytest.mark.parametrize("quant", ["f32", "q8_0"])
def test_a_folder_becomes_a_file(capsys, folder, tmp_path, quant):
    code, out, err = answer(capsys, "export", folder, "--gguf", tmp_path / "a.gguf", "--quant", quant)
    assert code == 0 and err.count("warning") == err.count("3 of 3 FFN widths are no multiple of 32") == 1
    assert "architecture llama" in out and quant in out and "qwen2, chat template" in out and "read back" in out
    assert ("a finer type" in out) == (quant == "q8_0")  # 40 channels are no whole number of blocks
    reader = GGUFReader(tmp_path / "a.gguf")
    assert reader.fields["general.name"].contents() == "plain" and names_in(tmp_path) == ["a.gguf"]
    assert not any(str(folder.parent).encode() in part.tobytes() for field in reader.fields.values() for part in field.parts)


def test_a_pruned_folder_becomes_a_file_with_layers_that_differ(capsys, fitted, tmp_path):
    fitted.prune(ratio=0.4, device="cpu").save_pretrained(tmp_path / "small")
    code, out, err = answer(capsys, "export", tmp_path / "small", "--gguf", tmp_path / "a.gguf", "--quant", "f32", "--json")
    record = json.loads(out)
    assert code == 0 and record["arch"] == "deci" and record["check"]["difference"] is None
    assert "warning: the file holds no tokenizer" in err  # the tiny one counts words
    small = load_model(str(tmp_path / "small")).model
    found = GGUFReader(tmp_path / "a.gguf").fields["deci.feed_forward_length"].contents()
    assert found == [layer.mlp.gate_proj.out_features for layer in small.model.layers]


@pytest.mark.parametrize("name", builders.HELD)
def test_a_file_made_tensor_by_tensor_is_that_of_the_whole_model_to_the_byte(tmp_path, name):
    tiny_models.save(tmp_path / "m", name, dtype=torch.bfloat16)
    model, tokenizer = load_model(str(tmp_path / "m")).model, tiny_models.tokenizer()
    for quant in ("bf16", "q8_0"):
        whole, streamed = tmp_path / f"whole-{quant}", tmp_path / f"streamed-{quant}"
        write_gguf(model, tokenizer, whole, quant, "m")
        source = replace(open_checkpoint(str(tmp_path / "m")), name="m", tokenizer=tokenizer)
        export(ExportConfig("m", str(streamed), quant), source)
        assert streamed.read_bytes() == whole.read_bytes()


def test_no_matrix_is_kept_while_a_file_is_made(tmp_path, monkeypatch):
    """Matrices are mapped one layer at a time, each anew whenever it is asked for."""
    tiny_models.save(tmp_path / "m", "llama-mha")
    source, alive = open_checkpoint(str(tmp_path / "m")), []
    get = Stored.__getitem__

    def watched(self, name):
        tensor = get(self, name)
        alive[:] = [one for one in alive if one[1]() is not None] + [(name, weakref.ref(tensor))]
        blocks = {part[0].split(".")[2] for part in alive if ".layers." in part[0] and part[1]().ndim > 1}
        assert len(blocks) <= 2  # the one that is read, and the one that is about to go
        return tensor

    monkeypatch.setattr(Stored, "__getitem__", watched)
    export(ExportConfig("m", str(tmp_path / "a.gguf"), "f32"), source)
    assert (tmp_path / "a.gguf").is_file()


@pytest.mark.parametrize("file", ["a.gguf", "small/a.gguf"])
def test_pruning_writes_both_at_widths_that_blocks_divide(capsys, fitted, place, tmp_path, file):
    place_of = {"--out": tmp_path / "small", "--gguf": tmp_path / file, "--model": place / "model", "--device": "cpu"}
    options = [str(part) for pair in place_of.items() for part in pair]
    code, out, err = answer(capsys, "prune", fitted.folder, "--ratio", 0.3, "--quant", "q8_0", *options)
    assert code == 0 and "architecture" in out and "with --align 32 predicted" in out and "without" in out
    plan = json.loads((tmp_path / "small" / "ppf.json").read_text())
    channels = [entry["kept"] for entry in plan["kept"] if entry["kind"] == "ffn"]
    assert all(kept in (32, 40) for kept in channels)
    assert plan["rounding"]["align"] == 32 and plan["rounding"]["tp"] == 1
    assert (tmp_path / file).is_file() and names_in(tmp_path)[-1] == "small" and len(names_in(tmp_path)) <= 2


def test_an_alignment_that_is_given_stays():
    wish = Target(ratio=0.3)
    assert PruneConfig("s", "o", wish, gguf="f", quant="q4_0").target.grid == (32, 1)
    assert PruneConfig("s", "o", wish, gguf="f", quant="q4_k_m").target.grid == (32, 1)
    assert PruneConfig("s", "o", Target(ratio=0.3, align=1, tp=2), gguf="f", quant="q4_0").target.grid == (1, 2)
    assert PruneConfig("s", "o", Target(ratio=0.3, align=64), gguf="f", quant="q8_0").target.grid == (64, 1)
    assert PruneConfig("s", "o", wish, gguf="f").target.grid == (32, 1)
    assert PruneConfig("s", "o", wish).target.grid == (1, 1)


def test_what_rounding_costs_is_that_of_the_two_decisions(fitted):
    decider = Decider(fitted.folder)
    target = Target(ratio=0.4, align=16, tp=2)
    found = decider.rounding(target)
    assert found["ppl"] == pytest.approx(np.exp(decider.decide(target).log_ppl))
    assert found["unrounded_ppl"] == pytest.approx(np.exp(decider.decide(Target(ratio=0.4)).log_ppl))
    kept = decider.decide(target).allocation.kept
    assert (kept % 2 == 0).all() and not (decider.decide(Target(ratio=0.4)).allocation.kept % 2 == 0).all()
    assert decider.rounding(Target(ratio=0.4)) is None
    assert fitted.policy(ratio=0.4, align=16, tp=2).allocation.kept.tolist() == kept.tolist()


def test_a_decision_tells_what_rounding_costs(capsys, fitted):
    options = ["policy", fitted.folder, "--ratio", 0.4, "--align"]
    code, out, _ = answer(capsys, *options, 16)
    found = Decider(fitted.folder).rounding(Target(ratio=0.4, align=16))
    assert code == 0 and f"with --align 16 predicted {found['ppl']:.2f}, without {found['unrounded_ppl']:.2f}" in out
    assert json.loads(answer(capsys, *options, 16, "--json")[1])["rounding"] == found
    assert "without" not in answer(capsys, *options, 1)[1]


def test_refining_keeps_the_grid(fitted, tmp_path):
    study = ppf.Study(copied(fitted, tmp_path / "study"), tiny_models.model("llama-mha"), tiny_models.tokenizer())
    pruned = study.prune(ratio=0.4, align=8, tp=2, refine=True, candidates=4, device="cpu")
    kept = pruned.decision.allocation.kept
    assert (kept % 2 == 0).all() and (kept[1::2] % 8 == 0).all()
    assert pruned.plan["rounding"]["tp"] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("export {model} --gguf {tmp}/old.gguf", 2, "--force"),
        ("export {model} --gguf {tmp}/none/a.gguf", 2, "none"),
        ("export {model} --gguf {tmp}", 2, "a folder or a link"),
        ("export {tmp}/none --gguf {tmp}/a.gguf", 2, "is none"),
        ("export {model} --gguf {tmp}/a.gguf --quant q4_k_m", 5, "ppf[llamacpp]"),
        ("export {model} --gguf {tmp}/a.gguf --quant q2_k", 2, "q2_k"),
        ("export {model}", 2, "--gguf"),
        ("prune {study} --ratio 0.3 --out {tmp}/out --quant q8_0", 2, "--gguf"),
        ("prune {study} --ratio 0.3 --out {tmp}/out --gguf {tmp}/old.gguf", 2, "--force"),
        ("prune {study} --ratio 0.3 --out {tmp}/out --gguf {tmp}/out", 2, "--out"),
        ("prune {study} --ratio 0.3 --out {tmp}/out --tp 3", 2, "--tp"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line_before_the_work(capsys, fitted, folder, tmp_path, arguments, code, words):
    (tmp_path / "old.gguf").write_text("old")
    given = arguments.format(model=folder, tmp=tmp_path, study=fitted.folder).split()
    found, out, err = answer(capsys, *given)
    last = err.splitlines()[-1]
    assert (found, out) == (code, "") and last.startswith("error: ") and words in last and last.count("; ") >= 2
    assert names_in(tmp_path) == ["old.gguf"]


def test_a_model_that_llama_cpp_cannot_hold_is_refused_before_it_is_pruned(tmp_path):
    loaded = adopt_model(tiny_models.model("qwen3-biases"), tiny_models.tokenizer())
    config = PruneConfig("s", "o", Target(ratio=0.3), gguf=str(tmp_path / "a.gguf"))
    with refuses(UnsupportedError):
        check_wish(config, loaded)
    check_wish(PruneConfig("s", "o", Target(ratio=0.3)), loaded)


def test_biases_that_llama_cpp_lacks_are_refused_before_the_work():
    wish = PruneConfig("s", "o", Target(ratio=0.3), gguf="f", compensate="bias")
    for name in ("llama-mha", "qwen2-gqa", "gpt_neox-parallel"):
        check_wish(wish, adopt_model(tiny_models.model(name), tiny_models.tokenizer()))
    with refuses(UnsupportedError) as caught:
        check_wish(wish, adopt_model(tiny_models.model("qwen3-mha-tied"), tiny_models.tokenizer()))
    assert "ridge" in str(caught.value)
    check_wish(replace(wish, compensate="ridge"), adopt_model(tiny_models.model("qwen3-mha-tied"), tiny_models.tokenizer()))


def test_what_is_decided_is_refused_before_the_work_where_llama_cpp_cannot_hold_it():
    dense = tiny_models.model("mixtral-gqa")
    loaded, wish = adopt_model(dense, tiny_models.tokenizer()), PruneConfig("s", "o", Target(ratio=0.3), gguf="f")
    layout = with_depth(dense, loaded.layout)
    kept = layout.units.copy()
    check_wish(wish, loaded, (layout, Allocation(kept.copy())))
    kept[[site.role for site in layout.sites].index("expert")] = 0
    with refuses(UnsupportedError) as caught:
        check_wish(wish, loaded, (layout, Allocation(kept)))
    assert "as many experts" in str(caught.value)


def test_a_stop_while_the_file_is_written_says_that_the_folder_is_there(capsys, place, fitted, tmp_path, monkeypatch):
    def stopped(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pruned, "save_gguf", stopped)
    study = copied(fitted, tmp_path / "study")
    out, file = tmp_path / "small", tmp_path / "a.gguf"
    code, _, err = answer(capsys, "prune", study, "--model", place / "model", "--ratio", 0.3, "--out", out, "--gguf", file)
    assert code == 130 and err.endswith(f"error: stopped; the folder {out} is written and whole, {file} is not written\n")
    assert load_model(str(out)) and not file.exists()


def test_where_padding_would_undo_the_pruning_the_folder_is_there_and_said_to_be(capsys, tmp_path):
    """Which layers differ is known only after the cut."""
    tiny_models.save(tmp_path / "untied", "qwen3-gqa")
    (tmp_path / "ratios.json").write_text("[0.0, 0.0, 0.5]")
    options = ["--plan", tmp_path / "ratios.json", "--align", 1, "--out", tmp_path / "small", "--gguf", tmp_path / "a.gguf"]
    code, out, err = answer(capsys, "prune", tmp_path / "untied", *options)
    assert code == 3 and out == "" and "layers alike" in err and f"{tmp_path / 'small'} is written and whole" in err
    assert load_model(str(tmp_path / "small")).layout.total < load_model(str(tmp_path / "untied")).layout.total
    assert "a.gguf" not in names_in(tmp_path)


def test_the_package_is_asked_for_by_name(tmp_path, monkeypatch):
    source = open_checkpoint(str(tiny_models.save(tmp_path / "m")))
    monkeypatch.setattr(gguf_check.importlib.util, "find_spec", lambda name: None)
    with refuses(ResourceError) as caught:
        export(ExportConfig("m", str(tmp_path / "a.gguf")), source)
    assert "ppf[gguf]" in str(caught.value)


@pytest.mark.parametrize("fields", [{"quant": "int3"}, {"gguf": 3}])
def test_what_is_no_setting_is_refused(fields):
    with refuses(InputError):
        ExportConfig(**{"model": "m", "gguf": "f", **fields})
