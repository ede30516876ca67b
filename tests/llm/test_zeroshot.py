import sys

import pytest

from builders import refuses
from ppf import cli
from ppf.errors import InputError, ResourceError
from ppf.llm import zeroshot
from ppf.recipes.zeroshot import table_of


@pytest.fixture
def without_the_package(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)


def test_without_the_package_it_is_said_in_one_line(without_the_package, capsys):
    with refuses(ResourceError) as caught:
        zeroshot.check_harness()
    assert "pip install 'ppf[eval]'" in str(caught.value)
    assert cli.main(["eval", "ref-a", "--tasks", "arc_easy"]) == 5
    assert capsys.readouterr().err == f"error: {caught.value}\n"


def test_perplexity_needs_no_package(without_the_package, place_of_model, capsys):
    folder, text = place_of_model
    assert cli.main(["eval", str(folder), "--text", str(text), "--seq-len", "16", "--tokens", "64", "--device", "cpu"]) == 0
    assert "perplexity" in capsys.readouterr().out


@pytest.fixture
def place_of_model(whole, tmp_path):
    (tmp_path / "text.txt").write_text(" ".join(f"w{3 + index % 90}" for index in range(400)))
    return whole, tmp_path / "text.txt"


def test_names_are_told_apart():
    assert zeroshot.task_names("arc_easy, hellaswag") == ["arc_easy", "hellaswag"]
    for wrong in ("", ",", "arc_easy,", "piqa,piqa"):
        with refuses(InputError):
            zeroshot.task_names(wrong)


def test_metrics_come_with_their_errors():
    result = {
        "acc,none": 0.5, "acc_stderr,none": 0.1, "f1,strict": 0.25, "f1_stderr,strict": "N/A", "alias": "x", "sample_len": 3,
        "ppl,none": 7.0, "ppl_stderr,none": float("nan"), "name,none": "words",
    }  # fmt: skip
    assert zeroshot._metrics(result) == {"acc": (0.5, 0.1), "f1 (strict)": (0.25, None), "ppl": (7.0, None)}


@pytest.mark.parametrize("roles", [["model"], ["against", "model"]])
def test_the_table_has_a_column_a_model(roles):
    found = {"t": {"acc": {"value": 0.5, "stderr": 0.1}, "ppl": {"value": 7.0, "stderr": None}}}
    header, rows = table_of({"models": dict.fromkeys(roles, found)})
    assert header == ["task", "metric", *(["dense", "model"] if len(roles) == 2 else ["model"])]
    assert rows == [["t", "acc", *["0.5000 +- 0.1000"] * len(roles)], ["t", "ppl", *["7.0000"] * len(roles)]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--against m", "--against"),
        ("--limit 3", "--limit"),
        ("--include-path p", "--include-path"),
        ("--tasks a --limit 0", "--limit"),
    ],
)
def test_options_of_tasks_need_tasks(capsys, options, words):
    assert cli.main(["eval", "ref-a", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and error.count("; ") >= 2
