import json
import subprocess
import sys

import pytest

from ppf import cli, commands, printing
from ppf.config import DemoConfig
from ppf.decide import missed_by
from ppf.errors import DamagedError, InUseError, ResourceError, UnsupportedError


def run(*arguments):
    """Exit code, standard output and standard error of a process."""
    result = subprocess.run([sys.executable, "-m", "ppf", *map(str, arguments)], capture_output=True, text=True)
    return result.returncode, result.stdout, result.stderr


def answer(capsys, *arguments):
    """The same in this process."""
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("policy", "STUDY"),
        ("polcy", "polcy"),
        ("policy s --ratoi 3", "--ratoi"),
        ("policy s --ratio x", "--ratio does not take 'x'"),
        ("policy s", "exactly one of --ratio, --params and --memory"),
        ("policy s --ratio 0.3 --params 3M", "--ratio and --params came"),
        ("policy s --ratio 0.3 --align 0", "--align must be at least 1"),
        ("policy s --params 3X", "'3X' came"),
        ("prune s --ratio 0.3", "--out"),
        ("prune s --ratio 0.3 --out o --candidates 0", "--candidates"),
        ("fit ref-a", "--study"),
        ("fit ref-a --study s --samples 3", "--samples must be at least 20"),
        ("fit ref-a --study s --score best", "invalid choice 'best'"),
        ("fit ref-a --study s --max-ratio nan", "--max-ratio"),
        ("fit ref-a --study s --ray-address a:1", "--ray-address must come with --engine ray"),
        ("fit ref-a --study s --engine ray --gpus-per-worker 2", "--gpus-per-worker must be a number in [0, 1]"),
        ("eval ref-a --seq-len 1", "--seq-len must be at least 8"),
        ("recover", "DIR"),
        ("recover d --full --lora-rank 8", "--full must come without --lora-rank"),
        ("recover d --lr 0", "--lr must be more than 0"),
        ("recover d --dtype float16", "invalid choice 'float16'"),
        ("bench", "at least one study"),
        ("bench s --budget 0", "--budget must be at least 1"),
        ("bench s --candidates 0", "--candidates must be at least 1"),
        ("bench s --ratios x", "--ratios"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(capsys, arguments, words):
    code, out, err = answer(capsys, *arguments.split())
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert err.count("; ") >= 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("policy {tmp}/none --ratio 0.3", 2, "no study.json"),
        ("prune {tmp}/none --ratio 0.3 --out {tmp}/out", 2, "no study.json"),
        ("prune {tmp} --ratio 0.3 --out {tmp}/full", 2, "is not empty"),
        ("policy {tmp}/broken --ratio 0.3", 4, "must hold JSON"),
        ("bench {tmp}/none --out {tmp}/bench.json", 2, "no study.json"),
        ("bench {tmp}/broken --out {tmp}/bench.json", 4, "must hold JSON"),
        ("eval {tmp}/none", 2, "is none"),
        ("eval {tmp}/gpt2", 3, "must be one of gemma2, gemma3_text, gpt_neox"),
        ("eval {tmp}/empty", 4, "model.safetensors"),
        ("fit ref-a --study {tmp}/full", 2, "'file'"),
        ("eval ref-a --text {tmp}/none.txt", 2, "none.txt"),
        ("eval ref-a --device abacus --tokens 300", 2, "--device"),
    ],
)
def test_bad_input_is_one_line_with_its_code(capsys, tmp_path, arguments, code, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "study.json").write_text("{")
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 1}')
    before = sorted(tmp_path.rglob("*"))
    found, out, err = answer(capsys, *arguments.format(tmp=tmp_path).split())
    last = err.splitlines()[-1]
    assert (found, out) == (code, "") and last.startswith("error: ") and words in last and last.count("; ") >= 2
    assert "Traceback" not in err and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UnsupportedError("a; b; c"), 3),
        (DamagedError("a; b; c"), 4),
        (ResourceError("a; b; c"), 5),
        (InUseError("a; b; c"), 6),
        (MemoryError(), 5),
        (KeyboardInterrupt(), 130),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_each_kind_of_failure_has_its_code(capsys, monkeypatch, error, code, debug):
    def fail(config):
        raise error

    monkeypatch.setitem(commands.COMMANDS, "demo", (DemoConfig, fail))
    found, out, err = answer(capsys, "demo", *(["--debug"] if debug else []))
    assert (found, out) == (code, "") and err.splitlines()[-1].startswith("error: ")
    assert ("Traceback" in err) == debug


def test_a_fault_of_ours_is_not_dressed_up(monkeypatch):
    def fail(config):
        raise ZeroDivisionError

    monkeypatch.setitem(commands.COMMANDS, "demo", (DemoConfig, fail))
    with pytest.raises(ZeroDivisionError):
        cli.main(["demo"])


@pytest.mark.parametrize(("command", "words"), [(["demo"], "is kept"), (["export", "m", "--gguf", "f"], "nothing was written")])
def test_a_stop_says_what_became_of_the_work(capsys, monkeypatch, command, words):
    def stop(config):
        raise KeyboardInterrupt

    for name, (kind, _) in list(commands.COMMANDS.items()):
        monkeypatch.setitem(commands.COMMANDS, name, (kind, stop))
    code, out, err = answer(capsys, *command)
    assert (code, out) == (130, "") and words in err


def test_help_tells_no_default_that_is_none(capsys):
    for command in commands.COMMANDS:
        assert "None" not in answer(capsys, command, "--help")[1]


def test_the_experts_of_a_layer_share_a_cell(capsys):
    kept = [
        {"layer": 0, "kind": "attn", "kept": 2, "of": 4}, {"layer": 0, "kind": "expert0", "kept": 3, "of": 9},
        {"layer": 0, "kind": "expert10", "kept": 7, "of": 9}, {"layer": 1, "kind": "ffn", "kept": 5, "of": 9},
    ]  # fmt: skip
    record = {
        "kept": kept, "ratio": {"asked": 0.3, "met": 0.3}, "predicted": {"ppl": 9.0, "log_ppl": 2.2, "std": 0.1},
        "params": {"before": 100, "after": 70}, "milliseconds": 1.0, "rounding": None,
    }  # fmt: skip
    printing.print_policy(record)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[:6]]
    assert ["layer", "attn", "expert", "ffn"] in rows
    assert ["0", "2", "of", "4", "3", "to", "7", "of", "9"] in rows and ["1", "5", "of", "9"] in rows


def test_help_and_version(capsys):
    for command in commands.COMMANDS:
        code, out, err = answer(capsys, command, "--help")
        assert code == 0 and err == "" and "--" in out
    assert answer(capsys)[1].count("•") == len(commands.COMMANDS)
    assert answer(capsys, "--version")[1].startswith("ppf ")


def test_eval_is_the_plain_loop(capsys, tmp_path):
    import numpy as np
    import torch

    from ppf.llm.load import load_model
    from ppf.llm.text import take_blocks, whole_text

    code, out, err = answer(capsys, "eval", "ref-a", "--tokens", 2000, "--seq-len", 64, "--json")
    record = json.loads(out)
    assert code == 0 and set(record) == {"ppl", "log_ppl", "interval", "tokens", "protocol"}
    loaded = load_model("ref-a")
    model = loaded.model.float()
    blocks = take_blocks(whole_text("pydocs", loaded.tokenizer), 64, 2000, 0, "pydocs")
    losses = []
    for row in torch.from_numpy(blocks).long():
        with torch.inference_mode():
            losses.append(torch.nn.functional.cross_entropy(model(input_ids=row[None]).logits[0, :-1], row[1:]).item())
    assert record["tokens"] == blocks.size and abs(record["log_ppl"] - np.mean(losses)) <= 1e-5
    low, high = record["interval"]
    assert low < record["ppl"] < high
    assert record["protocol"]["text"] == "pydocs" and record["protocol"]["seq_len"] == 64
    assert f"{record['ppl']:.4f}" in answer(capsys, "eval", "ref-a", "--tokens", 2000, "--seq-len", 64)[1]


def test_a_process_answers_bad_input_without_a_traceback(tmp_path):
    code, out, err = run("policy", tmp_path / "none", "--ratio", "0.3")
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m ppf fit --help | head -1"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert result.returncode == 0 and result.stderr == ""


@pytest.mark.parametrize(("z", "told"), [(0.9, False), (7.49, True)])
def test_a_predictor_that_promises_too_much_is_told(capsys, z, told):
    report = {"predictor": "corrected", "heldout": {"corrected": {"z": z}, "cnn": {"z": 99.0}}}
    printing.warn_missed(missed_by(report))
    assert ("7.5 of its standard deviations" in capsys.readouterr().err) == told and missed_by({}) == 1.0
