import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ppf.decide
from builders import refuses
from learn_builders import IMPORTANCE, LAYOUT, RATIOS, allocations, curves_of, fitted_study, probes, spread, truth
from ppf.config import Target
from ppf.decide import Decider
from ppf.errors import DamagedError, InputError
from ppf.learn import fit_predictor as module
from ppf.learn.agent import Agent
from ppf.learn.baselines import knapsack
from ppf.learn.fit_predictor import FITS, fit_predictor
from ppf.learn.objective import predicted
from ppf.learn.process import NOISE
from ppf.learn.train_agent import AgentConfig, train_agent
from ppf.space.allocation import Allocation, allocate
from ppf.space.budget import Budget
from ppf.space.mask import select
from ppf.space.policy import Policy

MAX_RATIO = 0.6
HEAVY = ("torch", "transformers", "scipy", "gymnasium")
DECIDES = f"""
import json, sys
from ppf.config import Target
from ppf.decide import Decider
for folder in sys.argv[1:]:
    decider = Decider(folder)
    record = decider.decide(Target(ratio=0.3)).to_json(decider.layout)
    print(json.dumps({{"met": record["ratio"]["met"], "log_ppl": record["predicted"]["log_ppl"]}}))
print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A fitted study for each kind of predictor; agent and predictors hardly trained."""
    of = truth()
    start = Agent(knapsack(curves_of(of), LAYOUT), np.array(MAX_RATIO))
    agent = train_agent(start, of, LAYOUT, 0.05, MAX_RATIO, 0, AgentConfig(steps=5))
    studies = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CNN_STEPS", 20)
        for kind in FITS:
            predictor = fit_predictor(kind, probes(of) + spread(of, 15), [], LAYOUT, 2.0, 0)
            studies[kind] = tmp_path_factory.mktemp("studies") / kind
            fitted_study(studies[kind], predictor, agent)
    return studies


@pytest.fixture(scope="module")
def decider(folders):
    return Decider(folders["corrected"])


def copy_of(folder, to):
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


# --- the decision ---


@pytest.mark.parametrize("align", [1, 8, 16])
@pytest.mark.parametrize("ratio", [0, 0.01, 0.1, 1 / 3, 0.45, 0.6])
def test_the_ratio_is_met_by_less_than_a_step_more(decider, ratio, align):
    decision = decider.decide(Target(ratio=ratio, align=align))
    assert decision.asked == ratio
    assert 0 <= decision.met - ratio < align * LAYOUT.costs.min() / LAYOUT.prunable
    kept = decision.allocation.kept
    assert decision.params == (LAYOUT.total, LAYOUT.total - (LAYOUT.units - kept) @ LAYOUT.costs)
    assert decision.met == pytest.approx((decision.params[0] - decision.params[1]) / LAYOUT.prunable)
    assert (kept[1::2] % align == 0).all()


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_agent_proposes_and_the_predictor_judges(decider, ratio):
    decision = decider.decide(Target(ratio=ratio))
    policy = decider.agent.propose(ratio)
    np.testing.assert_array_equal(decision.policy.keep, policy.keep)
    kept = allocate(policy, Budget.from_ratio(ratio, LAYOUT), LAYOUT).kept
    np.testing.assert_array_equal(decision.allocation.kept, kept)
    assert decision.mask.digest == select(Allocation(kept), IMPORTANCE, LAYOUT).digest
    expected = decider.predictor.predict(kept[None])
    assert (decision.prediction.damage, decision.prediction.std) == (expected.damage, expected.std)
    assert decision.log_ppl == 2.5 + expected.log_ppl[0]


@pytest.mark.parametrize(("missed", "wider"), [(4.0, 4.0), (0.5, 1.0)])
def test_what_held_out_masks_showed_to_be_too_narrow_is_widened(folders, tmp_path, missed, wider):
    folder = copy_of(folders["corrected"], tmp_path / "study")
    report = {"predictor": "corrected", "heldout": {"corrected": {"z": missed}}}
    (folder / "report.json").write_text(json.dumps(report))
    before, after = (Decider(where).decide(Target(ratio=0.3)) for where in (folders["corrected"], folder))
    assert after.log_ppl == before.log_ppl and after.prediction.damage == before.prediction.damage
    assert after.prediction.std == pytest.approx(wider * before.prediction.std)
    assert after.prediction.log_ppl_std == pytest.approx(wider * before.prediction.log_ppl_std)


@pytest.mark.parametrize("align", [4, 8, 16])
@pytest.mark.parametrize("ratio", RATIOS)
def test_on_a_grid_a_decision_is_no_worse_than_the_agents_or_the_nested_one_rounded(decider, ratio, align):
    target, objective = Target(ratio=ratio, align=align), predicted(decider.predictor)
    remove = decider.budget(target).remove
    nested = decider.chain.kept(np.array([remove]), align)[0] / LAYOUT.units
    others = [allocate(policy, Budget(remove), LAYOUT, align).kept for policy in (decider.agent.propose(ratio), Policy(nested))]
    ours, *rest = objective(np.stack([decider.decide(target).allocation.kept, *others]))
    assert ours <= min(rest) + 1e-9


def test_the_record_has_these_fields_and_is_strict_json(decider):
    decision = decider.decide(Target(ratio=0.3))
    record = decision.to_json(LAYOUT)
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert record == {
        "ratio": {"asked": 0.3, "met": decision.met},
        "kept": [
            {"layer": site.layer, "kind": site.kind, "kept": kept, "of": site.units}
            for site, kept in zip(LAYOUT.sites, decision.allocation.kept.tolist(), strict=True)
        ],
        "predicted": {
            "log_ppl": decision.log_ppl,
            "std": decision.prediction.log_ppl_std[0],
            "ppl": pytest.approx(np.exp(decision.log_ppl)),
        },
        "params": {"before": LAYOUT.total, "after": decision.params[1]},
        "in_range": True,
        "milliseconds": decision.milliseconds,
    }
    assert record["predicted"]["std"] > 0 and decision.milliseconds > 0
    assert list(record) == ["ratio", "kept", "predicted", "params", "in_range", "milliseconds"]


@pytest.mark.parametrize("ratio", [0.1, 0.37, 0.55])
def test_a_size_in_any_wording_is_the_same_job(decider, ratio):
    params, headers = LAYOUT.total - Budget.from_ratio(ratio, LAYOUT).remove, 2048 * (LAYOUT.layers + 2)
    in_params, in_bytes = decider.decide(Target(params=str(params))), decider.decide(Target(memory=f"{2 * params + headers}B"))
    assert in_params.mask.digest == in_bytes.mask.digest
    assert in_params.asked == in_bytes.asked == pytest.approx(ratio, abs=1e-4)
    by_ratio = decider.decide(Target(ratio=in_params.asked))
    assert by_ratio.mask.digest == in_params.mask.digest and by_ratio.met == in_params.met
    assert in_params.params[1] <= params


def test_a_model_that_is_small_enough_stays_as_it_is(decider):
    decision = decider.decide(Target(memory="1GB"))
    assert (decision.asked, decision.met, decision.params[1]) == (0, 0, LAYOUT.total)
    assert decision.log_ppl == pytest.approx(2.5, abs=NOISE)


def test_nested_decisions_lose_what_was_lost_before_and_meet_their_budgets(decider):
    ratios = np.linspace(0, 0.7, 60)
    found = [decider.decide(Target(ratio=float(ratio), nested=True)) for ratio in ratios]
    kept = np.array([decision.allocation.kept for decision in found])
    assert (np.diff(kept, axis=0) <= 0).all()
    for ratio, decision in zip(ratios, found, strict=True):
        assert 0 <= decision.met - ratio < LAYOUT.costs.max() / LAYOUT.prunable
        np.testing.assert_allclose(decision.policy.keep, decision.allocation.kept / LAYOUT.units)
    with refuses(InputError):
        decider.decide(Target(ratio=0.3, nested=True), Policy.uniform(LAYOUT))
    free = [decider.decide(Target(ratio=float(ratio))) for ratio in ratios]
    assert any((one.allocation.kept != other.allocation.kept).any() for one, other in zip(found, free, strict=True))


def test_ratios_beyond_the_agent_s_range_are_marked(decider):
    ratios = [0.0, 0.3, MAX_RATIO, MAX_RATIO + 1e-6, 0.7]
    decisions = [decider.decide(Target(ratio=ratio)) for ratio in ratios]
    assert [decision.in_range for decision in decisions] == [True, True, True, False, False]
    assert decisions[-1].met >= 0.7
    assert not decider.decide(Target(params=str(decisions[-1].params[1]))).in_range


def test_another_policy_may_be_given(decider):
    uniform = decider.decide(Target(ratio=0.4), Policy.uniform(LAYOUT))
    expected = allocate(Policy.uniform(LAYOUT), Budget.from_ratio(0.4, LAYOUT), LAYOUT)
    np.testing.assert_array_equal(uniform.allocation.kept, expected.kept)
    assert uniform.mask.digest != decider.decide(Target(ratio=0.4)).mask.digest


def test_an_allocation_that_was_found_otherwise_is_adopted_as_it_is(decider):
    for kept in allocations(5, 0.4, 0):
        decision = decider.adopt(Target(ratio=0.4), kept)
        np.testing.assert_array_equal(decision.allocation.kept, kept)
        np.testing.assert_array_equal(decision.mask.allocation.kept, kept)
        np.testing.assert_allclose(decision.policy.keep * LAYOUT.units, kept)
        assert decision.prediction.damage == decider.predictor.predict(kept[None]).damage
        assert decision.asked == 0.4 <= decision.met


def test_the_same_question_has_the_same_answer(folders):
    one, other = (Decider(folders["corrected"]).decide(Target(ratio=0.3)).to_json(LAYOUT) for _ in range(2))
    assert {**one, "milliseconds": 0} == {**other, "milliseconds": 0}


@pytest.mark.parametrize("target", [Target(ratio=0.999), Target(ratio=1.5), Target(params="1K"), Target(ratio=0.7, align=48)])
def test_more_than_can_go_is_refused(decider, target):
    with refuses(InputError):
        decider.decide(target)


# --- the folder ---


@pytest.mark.parametrize("missing", ["importance", "predictor", "agent", "nested"])
def test_a_study_that_is_not_fitted_is_refused(folders, tmp_path, missing):
    folder = copy_of(folders["additive"], tmp_path / "study")
    (folder / f"{missing}.safetensors").unlink()
    with refuses(InputError):
        Decider(folder)


def test_a_folder_without_a_study_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with refuses(InputError):
            Decider(folder)


@pytest.mark.parametrize("damaged", ["importance", "predictor", "agent"])
def test_a_damaged_artefact_is_refused(folders, tmp_path, damaged):
    folder = copy_of(folders["additive"], tmp_path / "study")
    path = folder / f"{damaged}.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with refuses(DamagedError):
        Decider(folder)


def test_an_artefact_in_the_place_of_another_is_refused(folders, tmp_path):
    folder = copy_of(folders["additive"], tmp_path / "study")
    (folder / "agent.safetensors").write_bytes((folder / "predictor.safetensors").read_bytes())
    with refuses(DamagedError):
        Decider(folder)


def test_deciding_imports_nothing_heavy_and_answers_the_same(folders):
    command = [sys.executable, "-W", "error", "-c", DECIDES, *(str(folder) for folder in folders.values())]
    path = str(Path(ppf.decide.__file__).parents[1])
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": path}, check=False)
    assert done.returncode == 0, done.stderr
    *answers, imported = [json.loads(line) for line in done.stdout.splitlines()]
    assert imported == []
    for folder, answer in zip(folders.values(), answers, strict=True):
        decision = Decider(folder).decide(Target(ratio=0.3))
        assert answer == {"met": decision.met, "log_ppl": pytest.approx(decision.log_ppl, rel=1e-6)}
