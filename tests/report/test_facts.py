import json

import numpy as np
import pytest

from builders import refuses
from learn_builders import DENSE_LOG_PPL, LAYOUT, RATIOS
from ppf.artifact import load_artifact
from ppf.config import Target
from ppf.decide import Decider
from ppf.errors import DamagedError, InputError
from ppf.report.facts import Facts, table_of


@pytest.fixture(scope="module")
def facts(study):
    return Facts(study.folder)


def test_a_study_that_is_not_fitted_is_refused(changed):
    (changed / "report.json").unlink()
    with refuses(InputError):
        Facts(changed)


@pytest.mark.parametrize("change", [{"tokens": None}, {"heldout": {}}, {"predictor": "other"}, {"seconds": 3}])
def test_a_report_that_is_not_whole_is_refused(changed, change):
    report = json.loads((changed / "report.json").read_text())
    (changed / "report.json").write_text(json.dumps({**report, **change}))
    with refuses(DamagedError):
        Facts(changed)


def test_ratios_lie_within_the_range(facts):
    assert facts.shown_ratios == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert facts.fine[0][0] == 0 and facts.fine[0][-1] == facts.max_ratio == 0.6


def test_what_stays_is_what_the_decider_keeps(facts, study):
    decider = Decider(study.folder)
    for ratio, kept in zip(facts.shown_ratios, facts.kept(facts.shown_ratios), strict=True):
        assert kept.tolist() == decider.decide(Target(ratio=ratio)).allocation.kept.tolist()


def test_the_line_is_what_the_decider_predicts(facts, study):
    decider = Decider(study.folder)
    ratios, found = facts.fine
    for place in (0, 40, 120):
        expected = decider.decide(Target(ratio=float(ratios[place]))).prediction
        assert found.log_ppl[place] == pytest.approx(expected.log_ppl[0])
        assert found.log_ppl_std[place] == pytest.approx(expected.log_ppl_std[0])


def test_masks_keep_what_was_measured_of_them(facts, study):
    masks = facts.masks("heldout")
    assert [sample.purpose for sample in masks.samples] == ["heldout"] * 24
    gone = [1 - LAYOUT.costs @ np.array(sample.kept) / LAYOUT.prunable for sample in masks.samples]
    assert masks.ratios == pytest.approx(gone)
    assert masks.damage.tolist() == [sample.kl for sample in masks.samples]
    assert masks.rises == pytest.approx([sample.log_ppl - DENSE_LOG_PPL for sample in masks.samples])


def test_probes_rise_with_what_is_gone(facts):
    for site in range(len(LAYOUT.sites)):
        shares, damages = zip(*facts.probes(site), strict=True)
        assert list(shares) == sorted(shares) and list(damages) == sorted(damages) and shares[0] > 0 and shares[-1] <= 1


def test_learning_ends_where_the_report_stands(facts):
    assert facts.learning[-1].mae_damage == pytest.approx(facts.report["heldout"]["corrected"]["mae_damage"])
    assert facts.learning[-1].samples == 36


def test_the_text_has_its_own_digest(facts, study):
    assert facts.text_digest == load_artifact(study.path("text"), "text")[1]["sha256"]


def test_the_own_table_is_of_cells_that_still_hold(facts, study, changed):
    table = facts.own_table()
    assert [(row["method"], row["ratio"]) for row in table.rows] == [(m, r) for r in RATIOS for m in ("uniform", "additive")]
    assert (table.model, table.text, table.tokens, table.seeds) == ("made up", "pydocs", 64, (0,))
    cells = json.loads((changed / "bench.json").read_text())
    dynamic = {"dynamic 0.2 of 00000000": {**cells[f"uniform {RATIOS[0]!r} "], "method": "dynamic", "ratio": 0.2}}
    (changed / "bench.json").write_text(json.dumps(dynamic))
    assert Facts(changed).own_table() is None
    (changed / "bench.json").unlink()
    assert Facts(changed).own_table() is None


@pytest.mark.parametrize(
    "content", ["[1]", '{"uniform 0.2 ": {"method": "uniform"}}', '{"uniform 0.2 ": {"method": "uniform", "ratio": 0.2}}']
)
def test_a_bench_that_is_none_is_refused(changed, content):
    (changed / "bench.json").write_text(content)
    with refuses(DamagedError):
        Facts(changed).own_table()


@pytest.mark.parametrize("content", ["[]", "{}", '{"result": 3}', '{"result": {"rows": [{"method": "x"}]}}', "{"])
def test_a_file_that_no_bench_wrote_is_refused(tmp_path, content):
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(DamagedError, match=r"bench\.json must "):
        table_of(tmp_path / "bench.json")
