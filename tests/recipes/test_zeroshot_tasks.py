"""Against lm-evaluation-harness itself, offline: tasks made of local files, on the embedded model."""

import json

import numpy as np
import pytest
import torch

import zeroshot_data
from builders import refuses
from ppf import cli
from ppf.config import EvalConfig
from ppf.errors import InputError
from ppf.llm.architectures import layout_of_model
from ppf.llm.export import export
from ppf.llm.load import load_model
from ppf.llm.placement import Placement
from ppf.llm.surgery import cut
from ppf.progress import Progress
from ppf.recipes.zeroshot import evaluate_tasks
from ppf.space.allocation import allocate
from ppf.space.budget import Budget
from ppf.space.mask import select
from ppf.space.policy import Policy

pytestmark = [pytest.mark.lm_eval, pytest.mark.filterwarnings("ignore")]  # the harness's own warnings are not ours


@pytest.fixture(scope="module", autouse=True)
def offline():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            patch.setenv(name, "1")
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return zeroshot_data.write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """The embedded model without two fifths of it."""
    from builders import importance

    loaded, folder = load_model("ref-a"), tmp_path_factory.mktemp("pruned") / "model"
    layout = layout_of_model(loaded.model)
    mask = select(allocate(Policy.uniform(layout), Budget.from_ratio(0.4, layout), layout), importance(layout), layout)
    export(cut(loaded.model, layout, mask), loaded.tokenizer, {}, folder)
    return folder


@pytest.fixture(scope="module")
def dense():
    """The embedded model, and its log-probability of an end after a beginning, one token after another."""
    loaded = load_model("ref-a")
    model = loaded.on(Placement(torch.device("cpu")), torch.float32)

    def log_probs(beginning, end):
        whole = loaded.tokenizer(f"{beginning} {end}", add_special_tokens=False)["input_ids"]
        start = len(loaded.tokenizer(beginning, add_special_tokens=False)["input_ids"])
        with torch.inference_mode():
            scores = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
        return [(float(scores[at - 1, whole[at]]), int(scores[at - 1].argmax()) == whole[at]) for at in range(start, len(whole))]

    return log_probs


def answers_of(tasks, name):
    """What the harness found, and the items that it asked."""
    record = evaluate_tasks(EvalConfig("ref-a", tasks=name, include_path=str(tasks), device="cpu"), Progress(True))
    return record["models"]["model"][name], [json.loads(line) for line in (tasks / f"{name}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["local_arc_easy", "local_winogrande"])
def test_accuracy_is_that_counted_by_hand(tasks, dense, name):
    found, items = answers_of(tasks, name)
    right = []
    for item in items:
        pairs = [(item["context"], end) if "context" in item else (end, item["end"]) for end in item["choices"]]
        right.append(int(np.argmax([sum(one for one, _ in dense(*pair)) for pair in pairs])) == item["label"])
    value = found["acc"]["value"]
    assert value == pytest.approx(np.mean(right)) and len(items) == 64
    assert found["acc"]["stderr"] == pytest.approx((value * (1 - value) / (len(items) - 1)) ** 0.5)


def test_the_last_word_is_as_likely_as_by_hand(tasks, dense):
    found, items = answers_of(tasks, "local_lambada")
    words = [dense(item["context"], item["word"]) for item in items]
    surprise = [-sum(one for one, _ in word) for word in words]
    assert found["perplexity"]["value"] == pytest.approx(np.exp(np.mean(surprise)), rel=1e-4)
    assert found["acc"]["value"] == pytest.approx(np.mean([all(greedy for _, greedy in word) for word in words]))


def test_two_models_stand_side_by_side(tasks, pruned, capfd):
    command = ["eval", str(pruned), "--against", "ref-a", "--include-path", str(tasks), "--limit", "12", "--device", "cpu"]
    assert cli.main([*command, "--tasks", "local_hellaswag,local_piqa", "--json"]) == 0
    record = json.loads(capfd.readouterr().out)  # nothing else on standard output
    dense, ours = record["models"]["against"], record["models"]["model"]
    assert list(record["models"]) == ["against", "model"] and list(dense) == list(ours) == ["local_hellaswag", "local_piqa"]
    assert dense != ours and record["protocol"]["limit"] == 12
    assert all((12 * task["acc"]["value"]) % 1 == pytest.approx(0, abs=1e-9) for task in (*dense.values(), *ours.values()))
    assert cli.main([*command, "--tasks", "local_piqa"]) == 0
    table = capfd.readouterr().out
    assert "dense" in table and "+-" in table and "local_piqa" in table


def test_what_cannot_be_asked_is_refused(tasks, tmp_path):
    (tmp_path / "broken.yaml").write_text("task: broken\ndataset_path: json\ndataset_kwargs: {data_files: {test: none.jsonl}}\n")
    for wrong in ({"include_path": str(tmp_path / "none")}, {"include_path": str(tasks), "tasks": "no_such_task"}):
        with refuses(InputError):
            evaluate_tasks(EvalConfig("ref-a", **{"tasks": "local_piqa", "device": "cpu", **wrong}), Progress(True))
    with pytest.raises(Exception) as caught:
        evaluate_tasks(EvalConfig("ref-a", tasks="broken", include_path=str(tmp_path), device="cpu"), Progress(True))
    assert "\n" not in str(caught.value) and str(caught.value).count("; ") >= 2
