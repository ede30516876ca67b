import json

import numpy as np
import pytest

from builders import refuses
from learn_builders import LAYOUT, curves_of, fitted_study, probes, spread, truth
from ppf.config import BenchConfig
from ppf.errors import DamagedError
from ppf.learn.agent import Agent
from ppf.learn.baselines import knapsack
from ppf.learn.fit_predictor import fit_predictor
from ppf.recipes.cells import cell_key, current_cells, taught_by

CONFIG = BenchConfig(("s",))
METHODS = ("uniform", "cma", "cma_on_predictor", "nested", "dynamic", "static")


@pytest.fixture
def study(tmp_path):
    of = truth()
    agent = Agent(knapsack(curves_of(of), LAYOUT), np.array(0.6))
    made = fitted_study(tmp_path / "study", fit_predictor("additive", probes(of) + spread(of, 4), [], LAYOUT, 2.0, 0), agent)
    (made.folder / "report.json").write_text(json.dumps({"tokens": {"measured": 1000}}))
    taught = taught_by(made)
    cells = {cell_key(name, 0.2, CONFIG, taught): {"method": name, "ratio": 0.2} for name in METHODS}
    (made.folder / "bench.json").write_text(json.dumps(cells))
    return made


def current(study):
    return [cell["method"] for cell in current_cells(study)]


def test_all_hold_while_nothing_changes(study):
    assert current(study) == list(METHODS)


def test_a_study_without_a_bench_has_none(study):
    (study.folder / "bench.json").unlink()
    assert current(study) == []


@pytest.mark.parametrize(("artefact", "gone"), [("agent", {"cma_on_predictor", "dynamic", "static"}), ("nested", {"nested"})])
def test_what_was_fitted_again_gives_other_cells(study, artefact, gone):
    path = study.path(artefact)
    path.write_bytes(path.read_bytes() + b" ")
    assert current(study) == [name for name in METHODS if name not in gone]


@pytest.mark.parametrize("usual", [True, False])
def test_of_several_terms_the_usual_ones_count_or_else_the_newest(study, usual):
    path, taught = study.folder / "bench.json", taught_by(study)
    cells = json.loads(path.read_text())
    if not usual:
        cells = {key: cell for key, cell in cells.items() if cell["method"] not in ("cma", "static")}
    for spent in (5, 7):
        other = BenchConfig(("s",), budget=spent, candidates=spent)
        for name in ("cma", "static"):
            cells[cell_key(name, 0.2, other, taught)] = {"method": name, "ratio": 0.2, "spent": spent}
    path.write_text(json.dumps(cells))
    found = {cell["method"]: cell.get("spent") for cell in current_cells(study)}
    assert len(current(study)) == len(METHODS)
    assert {found["cma"], found["static"]} == {None if usual else 7}


@pytest.mark.parametrize("content", ["[]", '{"a": 1}', '{"a": {}}'])
def test_a_file_of_other_things_is_refused(study, content):
    (study.folder / "bench.json").write_text(content)
    with refuses(DamagedError):
        current_cells(study)
