import json

import pytest

import tiny_models  # noqa: F401 (transformers is imported quietly)
from builders import copied
from ppf.report import page
from ppf.report.facts import Facts, Table
from ppf.report.sections import report_page
from ppf.study import read_sealed, write_sealed

NASTY = "<img src=x onerror=alert(1)>"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """The bundle is long and says nothing here."""
    monkeypatch.setattr(page, "plotly_bundle", lambda: "")


def test_a_report_has_all_its_parts(study):
    made = report_page(Facts(study.folder))
    for heading in (
        "What stays in each layer", "What it costs", "How well it predicts", "Learning curve", "Sensitivity of each site",
        "Ways to choose what goes", "What the fit took", "How to make it again",
    ):  # fmt: skip
        assert made.count(f">{heading}</h") == 1, heading
    assert made.count('<script type="application/json">') == 9
    for words in (
        "ppf fit &#x27;made up&#x27; --study runs/x --rounds 3",
        "123,456",
        "corrected*",
        "not recorded",
        "torch 2.11",
        "abc",
    ):
        assert (words in made) == (words != "not recorded"), words


def test_the_figures_are_those_of_the_study(study):
    facts = Facts(study.folder)
    made, found = report_page(facts), facts.report["heldout"]["corrected"]
    assert f"<dd>{found['tau_mean']:.3f}<small>" in made and f"<dd>{found['mae']:.4f}<small>" in made
    assert "<dd>0 min" not in made and "<dd>10 s<small>" in made
    least = min((row for row in facts.own_table().rows if row["ratio"] == 0.2), key=lambda row: row["above"])
    assert f"<b>{least['above']:.4f}*</b>" in made


def test_what_a_study_calls_itself_is_text(study, tmp_path):
    folder = copied(study, tmp_path / "study", name=NASTY, type=NASTY)
    record = read_sealed(folder / "study.json")
    record["settings"]["text"] = record["settings"]["model"] = NASTY
    write_sealed(folder / "study.json", record)
    row = {"method": NASTY, "ratio": 0.2, "above": 0.1, "tokens": 1, "shared_tokens": 1, "regret": 0}
    made = report_page(Facts(folder), [Table(NASTY, NASTY, 1, 2, (0, 1), (row,))])
    assert "<img" not in made and "onerror=alert(1)&gt;" in made


def test_a_study_of_an_older_fit_says_what_it_lacks(changed):
    report = json.loads((changed / "report.json").read_text())
    del report["made"]
    (changed / "report.json").write_text(json.dumps(report))
    (changed / "bench.json").unlink()
    made = report_page(Facts(changed))
    assert made.count("not recorded") == 2 and "Ways to choose what goes" not in made


def test_folders_of_the_machine_are_not_told(changed):
    record = read_sealed(changed / "study.json")
    record["model"]["name"] = record["settings"]["model"] = "/home/someone/models/m7"
    record["settings"] |= {"text": "/home/someone/t.txt", "study": "/home/someone/s"}
    write_sealed(changed / "study.json", record)
    made = report_page(Facts(changed))
    assert "someone" not in made and "ppf fit m7 --study s --text t.txt" in made
