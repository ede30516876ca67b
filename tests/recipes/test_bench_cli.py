import json

import pytest

from builders import copied
from ppf import cli
from ppf.recipes.bench import METHODS, ON_PREDICTOR


def test_the_command_prints_a_table_and_writes_the_results(fitted, place, tmp_path, capsys):
    study, out = copied(fitted, tmp_path / "s", name=str(place / "model")), tmp_path / "results.json"
    arguments = ["bench", str(study), "--ratios", "0.2", "0.5", "--methods", "uniform", "dynamic", "--workers", "1"]
    assert cli.main([*arguments, "--device", "cpu", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    record = json.loads(out.read_text())
    assert set(record) == {"command", "version", "commit", "machine", "result"}
    assert record["result"]["model"] == "model" and str(tmp_path) not in out.read_text() and str(place) not in out.read_text()
    lines = {line.split()[0]: line.split()[1:] for line in printed.splitlines() if line.split()}
    assert lines["method"] == ["tokens", "20", "%", "50", "%"] and "results.json" in printed
    for row in record["result"]["rows"]:
        shown = lines[row["method"]][2 + [0.2, 0.5].index(row["ratio"])]
        assert shown == f"{row['above']:.4f}" + ("*" if row["regret"] == 0 else "")
        assert lines[row["method"]][0] == f"{(row['tokens'] + row['shared_tokens']) / 1e6:.2f}"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("--methods uniform best", 2, "'best'"),
        ("--ratios 0.2 0.999", 2, "at most ratio"),
        ("--out {place}", 2, "--out"),
        ("--out {place}/none/b.json", 2, "--out"),
        ("--device abacus", 2, "--device"),
        ("{other}", 2, "must be of one model"),
    ],
)
def test_a_bench_that_cannot_be_is_one_line_with_its_code(fitted, place, tmp_path, capsys, arguments, code, words):
    study, other = copied(fitted, tmp_path / "s", name=str(place / "model")), copied(fitted, tmp_path / "o", digest="x")
    given = ["bench", str(study), *arguments.format(other=other, place=place).split()]
    found = cli.main(given if "--out" in given else [*given, "--out", str(tmp_path / "b.json")])
    captured = capsys.readouterr()
    last = captured.err.splitlines()[-1]
    assert (found, captured.out) == (code, "") and last.startswith("error: ") and words in last
    assert "loading" not in captured.err or "--device" in words  # found before the work
    assert not (tmp_path / "b.json").exists() and not (study / "bench.json").exists()


def test_help_names_every_method(capsys):
    assert cli.main(["bench", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert [name for name in METHODS if name.removesuffix(ON_PREDICTOR) not in shown] == []
