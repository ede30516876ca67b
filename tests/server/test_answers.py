import json

import numpy as np
import pytest

from builders import copied
from ppf.config import Target
from ppf.decide import Decider
from ppf.server.answers import points, policy_record, study_record
from ppf.space.budget import largest_ratio
from ppf.study import StudyFolder


@pytest.fixture(scope="module")
def decider(study):
    return Decider(study)


def test_the_study_in_one_record(decider):
    record = study_record(decider, live=True)
    layout = decider.layout
    assert record["model"] == {
        "name": "tiny", "type": "llama", "layers": 3, "params": layout.total, "prunable": layout.prunable, "bytes_per_param": 4,
    }  # fmt: skip
    assert record["ratios"]["max"] == 0.6 and record["ratios"]["floor"] == largest_ratio(decider.layout)
    assert record["dense"] == {"log_ppl": 2.5, "ppl": pytest.approx(np.exp(2.5))}
    assert record["predictor"] == {"kind": "additive", "heldout": {"count": 9, "tau_mean": 0.9}}
    assert record["protocol"] == {"text": "text.txt", "seq_len": 16, "tokens": 200, "dtype": "float32"}
    assert record["live"] is True


def test_no_folder_of_this_machine_is_told(decider, study):
    text = json.dumps(study_record(decider, live=False), allow_nan=False)
    assert str(study.parent) not in text and "/" not in text


def test_the_largest_ratio_can_be_decided_and_no_larger(decider):
    largest = largest_ratio(decider.layout)
    assert decider.decide(Target(ratio=largest)).allocation.kept.tolist() == decider.layout.floors.tolist()
    with pytest.raises(ValueError, match="ask for less"):
        decider.decide(Target(ratio=largest + 2e-4))
    assert largest_ratio(decider.layout, 8) < largest


def test_points_are_the_measured_samples_on_the_axis_of_predictions(decider):
    samples, found = decider.study.store().all(), points(decider)
    assert len(found) == len(samples)
    assert [one["ratio"] for one in found] == sorted(one["ratio"] for one in found)
    layout = decider.layout
    expected = sorted(
        (round(1 - float(np.array(one.kept) @ layout.costs) / layout.prunable, 5), round(one.log_ppl + 0.5, 9), one.purpose)
        for one in samples
    )
    assert sorted((one["ratio"], round(one["log_ppl"], 9), one["kind"]) for one in found) == expected


def test_many_points_are_thinned_evenly(decider):
    few, all_ = points(decider, 10), points(decider)
    assert len(few) == 10 and few[0] == all_[0] and few[-1] == all_[-1] and all(one in all_ for one in few)


def test_a_policy_is_that_of_the_command_with_its_bytes(decider):
    target = Target(ratio=0.3)
    record, decision = policy_record(decider, target), decider.decide(target)
    own = decision.to_json(decider.layout)
    assert {name: record[name] for name in own if name != "milliseconds"} == {
        name: own[name] for name in own if name != "milliseconds"
    }
    assert record["memory"] == 4 * decision.params[1]
    groups = sum(entry["kept"] for entry in record["kept"] if entry["kind"] == "attn")
    assert record["kv_bytes_per_token"] == groups * 2 * 8 * 4


def test_a_model_that_has_gone_is_named_all_the_same(study, tmp_path):
    folder = copied(StudyFolder(study), tmp_path / "other", name="/not/there/big-model")
    assert study_record(Decider(folder), live=False)["model"]["name"] == "big-model"
