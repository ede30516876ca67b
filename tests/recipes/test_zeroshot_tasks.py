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


def accuracy(items):
    """Of ref-a, counted by hand: the likeliest ending by its tokens' summed log-probability."""
    loaded = load_model("ref-a")
    model, right = loaded.on(torch.device("cpu"), torch.float32), []
    for item in items:
        scores = []
        for choice in item["choices"]:
            whole = loaded.tokenizer(f"{item['context']} {choice}", add_special_tokens=False)["input_ids"]
            start = len(loaded.tokenizer(item["context"], add_special_tokens=False)["input_ids"])
            with torch.inference_mode():
                log_probs = model(input_ids=torch.tensor([whole]), use_cache=False).logits[0].log_softmax(-1)
            scores.append(sum(float(log_probs[at - 1, whole[at]]) for at in range(start, len(whole))))
        right.append(int(np.argmax(scores)) == item["label"])
    return np.mean(right)


def test_accuracy_is_that_counted_by_hand(tasks):
    record = evaluate_tasks(EvalConfig("ref-a", tasks="local_arc_easy", include_path=str(tasks), device="cpu"), Progress(True))
    found = record["models"]["model"]["local_arc_easy"]
    items = [json.loads(line) for line in (tasks / "local_arc_easy.jsonl").read_text().splitlines()]
    assert found["acc"]["value"] == pytest.approx(accuracy(items))
    value = found["acc"]["value"]
    assert found["acc"]["stderr"] == pytest.approx((value * (1 - value) / (len(items) - 1)) ** 0.5)


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
