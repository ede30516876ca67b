"""Local tasks for lm-evaluation-harness, made at test time of the public files that may lie beside the checkout."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DATA = Path(__file__).parents[2] / "shared" / "data" / "zeroshot"
"""In ``../shared`` of the repository; nothing of it is kept here."""

_HEAD = """task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
"""
_ACCURACY = """  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
_ENDS = f"""output_type: multiple_choice
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
metric_list:
{_ACCURACY}{_ACCURACY.replace("acc", "acc_norm")}"""
"""The likeliest of several ends."""
_BEGINNINGS = f"""output_type: multiple_choice
doc_to_text: "{{{{label}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{end}}}}"
metric_list:
{_ACCURACY}"""
"""The beginning after which the end is likeliest; a number in the place of the text says so to the harness."""
_LAST_WORD = f"""output_type: loglikelihood
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{' ' + word}}}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
{_ACCURACY}"""


def hellaswag() -> Iterator[dict[str, Any]]:
    lines = (DATA / "hellaswag_val.txt").read_text(encoding="utf-8").splitlines()
    for start in range(0, len(lines) - 5, 6):
        context, label, *endings = lines[start : start + 6]
        yield {"context": context, "choices": endings, "label": int(label)}


def piqa() -> Iterator[dict[str, Any]]:
    items = (DATA / "piqa_valid.jsonl").read_text(encoding="utf-8").splitlines()
    for item, label in zip(items, (DATA / "piqa_valid-labels.lst").read_text().split(), strict=True):
        record = json.loads(item)
        yield {"context": f"Question: {record['goal']}\nAnswer:", "choices": [record["sol1"], record["sol2"]], "label": int(label)}


def arc_easy() -> Iterator[dict[str, Any]]:
    for record in json.loads((DATA / "arc_easy_test.json").read_text(encoding="utf-8")):
        question, _, answers = record["instruction"].partition("\n\n")
        choices = re.split(r"\s*Answer\d: ", answers.partition("\n\nAnswer format")[0])[1:]
        text = question.removeprefix("Please choose the correct answer to the question: ")
        yield {"context": f"Question: {text}\nAnswer:", "choices": choices, "label": int(record["answer"][-1]) - 1}


def lambada() -> Iterator[dict[str, Any]]:
    for line in (DATA / "lambada_test.jsonl").read_text(encoding="utf-8").splitlines():
        context, _, word = json.loads(line)["text"].rpartition(" ")
        yield {"context": context, "word": word}


def winogrande() -> Iterator[dict[str, Any]]:
    for record in json.loads((DATA / "winogrande_test.json").read_text(encoding="utf-8")):
        sentence, _, options = record["instruction"].partition("\n\n")
        first, last = sentence.partition("sentence: ")[2].split("_")
        choices = re.fullmatch(r"Option1: (.*) Option2: (.*) Answer format: .*", options)
        assert choices is not None
        yield {"choices": [first + name for name in choices.groups()], "end": last.strip(), "label": int(record["answer"][-1]) - 1}


TASKS = {
    "local_hellaswag": (hellaswag, _ENDS),
    "local_piqa": (piqa, _ENDS),
    "local_arc_easy": (arc_easy, _ENDS),
    "local_lambada": (lambada, _LAST_WORD),
    "local_winogrande": (winogrande, _BEGINNINGS),
}


def write_tasks(folder: Path, most: int = 64) -> Path:
    """A folder of tasks and the first items of each.

    Skips the test, by name of what is missing, where the data is not there.
    """
    if not DATA.is_dir():
        pytest.skip("shared/data/zeroshot is not beside the checkout")
    for name, (items, questions) in TASKS.items():
        lines = [json.dumps(item) for _, item in zip(range(most), items(), strict=False)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        head = _HEAD.format(task=name, file=folder / f"{name}.jsonl")
        (folder / f"{name}.yaml").write_text(head + questions, encoding="utf-8")
    return folder
