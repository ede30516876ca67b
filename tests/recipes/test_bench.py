import hashlib
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from builders import copied, interrupted, refuses
from ppf.config import BenchConfig, Target
from ppf.decide import Decider
from ppf.errors import DamagedError, InputError, InUseError
from ppf.learn.baselines import HEURISTICS
from ppf.learn.black_box import SEARCHES
from ppf.llm.masking import masked
from ppf.llm.perplexity import evaluate
from ppf.llm.scores import score_units
from ppf.llm.text import Text
from ppf.lock import locked
from ppf.progress import Progress
from ppf.recipes import bench as recipe
from ppf.recipes.bench import OWN_ORDER, bench
from ppf.recipes.lab import Lab
from ppf.recipes.refine import FINALISTS
from ppf.samples import Measurement
from ppf.space.allocation import Allocation, allocate
from ppf.space.mask import select
from ppf.space.policy import Policy
from ppf.study import StudyFolder

RATIOS = (0.2, 0.5)
BUDGET = 4096
METHODS = [
    *HEURISTICS,
    *OWN_ORDER,
    "additive",
    *SEARCHES,
    *(f"{name}_on_predictor" for name in SEARCHES),
    "nested",
    "dynamic",
    "static",
]

pytestmark = pytest.mark.filterwarnings("ignore:Could not import matplotlib")


def ran(*studies, **changes):
    methods = changes.get("methods", METHODS)
    effort = {"budget": BUDGET} if set(SEARCHES) & set(methods) else {}
    effort |= {"candidates": 4} if "static" in methods else {}
    settings = {"ratios": RATIOS, "device": "cpu", **effort, **changes}
    return bench(BenchConfig(tuple(map(str, studies)), **settings), Progress(quiet=True))


def cells_of(study):
    return json.loads((study / "bench.json").read_text())


def contents(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def layout_of(study):
    return StudyFolder(study).layout


def fitted_report(study):
    return json.loads((study / "report.json").read_text())


def counted(patch, owner, name):
    """Calls of a function, each as its arguments and its answer."""
    calls, original = [], getattr(owner, name)

    def spy(*arguments, **named):
        answer = original(*arguments, **named)
        calls.append((arguments, answer))
        return answer

    patch.setattr(owner, name, spy)
    return calls


def measure_here(patch, fitted):
    """The model of the study is at hand, so that measuring happens in this process; few questions to predictors."""
    pytest.importorskip("cma", exc_type=ImportError)
    patch.setattr(recipe, "load_for", lambda name, progress: fitted._loaded)
    patch.setattr(recipe, "PREDICTED_QUESTIONS", 150)


@pytest.fixture
def here(fitted, monkeypatch):
    measure_here(monkeypatch, fitted)


@pytest.fixture(scope="module")
def all_run(fitted, tmp_path_factory):
    """All methods at two ratios: the study, what came out, the files before and after, and what was asked of the model."""
    study = copied(fitted, tmp_path_factory.mktemp("bench") / "study")
    before = contents(study)
    with pytest.MonkeyPatch.context() as patch:
        measure_here(patch, fitted)
        asked, statistics = counted(patch, Lab, "answers"), counted(patch, recipe, "layer_statistics")
        result = ran(study)
    return SimpleNamespace(study=study, result=result, before=before, after=contents(study), asked=asked, statistics=statistics)


def test_there_is_a_row_for_each_method_and_ratio(all_run):
    rows = all_run.result["rows"]
    assert [(row["ratio"], row["method"]) for row in rows] == [(ratio, method) for ratio in RATIOS for method in METHODS]
    assert all(row["runs"] == 1 and row["seeds"] is None and row["kl"] > 0 for row in rows)
    json.dumps(all_run.result, allow_nan=False)


def test_every_choice_meets_its_budget_as_allocate_does(all_run):
    decider = Decider(all_run.study)
    layout = decider.layout
    for cell in cells_of(all_run.study).values():
        kept, budget = np.array(cell["kept"]), decider.budget(Target(ratio=cell["ratio"]))
        over = int((layout.units - kept) @ layout.costs) - budget.remove
        if cell["method"] == "nested":  # a KV group goes whole and nothing comes back for it
            assert 0 <= over < layout.costs.max()
            continue
        assert 0 <= over < layout.costs.min(), cell["method"]
        np.testing.assert_array_equal(allocate(Policy(kept / layout.units), budget, layout).kept, kept)


def test_the_study_learns_nothing_and_gets_its_cells(all_run):
    assert all_run.after.pop("bench.json") and all_run.after == all_run.before
    assert len(cells_of(all_run.study)) == len(METHODS) * len(RATIOS)


def test_what_is_above_dense_is_what_evaluate_gives_on_the_test_blocks(all_run, fitted):
    decider, model = Decider(all_run.study), fitted._loaded.model
    text = Text.load(all_run.study / "text.safetensors", decider.layout.fingerprint)
    dense = evaluate(model, text.test).blocks
    for cell in cells_of(all_run.study).values():
        score = OWN_ORDER.get(cell["method"], (None,))[0]
        order = score_units(model, decider.layout, text.calibration, score, "", 0) if score else decider.importance
        mask = select(Allocation(np.array(cell["kept"])), order, decider.layout)
        with masked(model, decider.layout, mask):
            above = evaluate(model, text.test).blocks - dense
        np.testing.assert_allclose(cell["above"], above, atol=2e-6)
        assert len(cell["kl"]) == len(above) and min(cell["kl"]) > 0


def test_methods_that_ask_no_model_say_so_and_the_rest_what_they_asked(all_run):
    report, text = fitted_report(all_run.study), Text.load(all_run.study / "text.safetensors", layout_of(all_run.study).fingerprint)
    spent = {(cell["method"], cell["ratio"]): cell for cell in cells_of(all_run.study).values()}
    free = [name for name in METHODS if name not in (*SEARCHES, "static")]
    assert {spent[name, ratio]["tokens"] for name in free for ratio in RATIOS} == {0}
    for ratio in RATIOS:
        shared = {name: spent[name, ratio]["shared_tokens"] for name in METHODS}
        assert shared["wanda_sp"] == shared["flap_own_order"] == text.calibration.size <= shared["uniform"]
        assert shared["uniform"] == shared["random"] == report["tokens"]["calibration"] + report["tokens"]["importance"]
        assert shared["additive"] - shared["uniform"] == report["samples"]["probe"] * text.search.size
        assert shared["dynamic"] == shared["cma_on_predictor"] == sum(report["tokens"].values()) > shared["additive"]
    searched = sum(answer.tokens for (_, _, part, *_), answers in all_run.asked for answer in answers if part == "search")
    assert sum(spent[name, ratio]["tokens"] for name in SEARCHES for ratio in RATIOS) == searched


def test_true_searches_spend_what_they_may_and_one_generation_at_most(all_run):
    generation = {"random": 0, "evolution": 11 * 256, "cma": 9 * 256}
    for cell in cells_of(all_run.study).values():
        if cell["method"] in SEARCHES:
            assert BUDGET - 256 < cell["tokens"] <= BUDGET + generation[cell["method"]], cell["method"]


def test_static_pays_for_its_own_candidates_and_for_validation(all_run):
    layout = layout_of(all_run.study)
    text = Text.load(all_run.study / "text.safetensors", layout.fingerprint)
    earlier = sum(sample.tokens for sample in StudyFolder(all_run.study).store().all("refine"))
    first, second = (cell for cell in cells_of(all_run.study).values() if cell["method"] == "static")
    fit_tokens = sum(fitted_report(all_run.study)["tokens"].values())
    own = [cell["tokens"] - FINALISTS * text.validation.size for cell in (first, second)]
    assert all(0 <= tokens <= 4 * text.search.size for tokens in own)
    assert first["shared_tokens"] == fit_tokens + earlier
    assert second["shared_tokens"] == fit_tokens + earlier + own[0]


def test_the_search_text_is_all_that_searches_see(all_run):
    searches = [(arguments[2], arguments[3:]) for arguments, _ in all_run.asked if arguments[2] != "test"]
    assert {part for part, _ in searches} == {"search", "validation"}
    assert sum(part == "validation" for part, _ in searches) == len(RATIOS)  # static, once at each


def test_statistics_are_computed_once_and_only_if_a_rule_asks(fitted, here, all_run, tmp_path, monkeypatch):
    assert len(all_run.statistics) == 1
    calls = counted(monkeypatch, recipe, "layer_statistics")
    study = copied(fitted, tmp_path / "s")
    ran(study, methods=("dynamic",))
    assert not calls
    ran(study, methods=("owl", "depth", "flap"))
    assert len(calls) == 1


def test_the_dense_model_is_done_with_before_anything_is_measured(fitted, here, tmp_path, monkeypatch):
    """Measuring processes fill what memory there is."""
    order = []
    for owner, name in ((recipe, "layer_statistics"), (recipe, "score_units"), (Lab, "answers")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a, of=original, name=name, **k: order.append(name) or of(*a, **k))
    ran(copied(fitted, tmp_path / "s"), methods=("uniform", *OWN_ORDER))
    first = order.index("answers")
    assert "layer_statistics" in order[:first] and "score_units" in order[:first] and set(order[first:]) == {"answers"}


def test_a_study_that_was_fitted_anew_since_is_said(fitted, here, tmp_path, monkeypatch):
    study, load_for = copied(fitted, tmp_path / "s"), recipe.load_for

    def meanwhile(*arguments):
        report = study / "report.json"
        content = report.read_bytes()
        report.unlink()
        report.write_bytes(content + b"\n")
        return load_for(*arguments)

    monkeypatch.setattr(recipe, "load_for", meanwhile)
    with refuses(DamagedError):
        ran(study, methods=("uniform",))


def test_a_second_run_takes_everything_from_the_study(all_run, here, monkeypatch):
    for owner, name in ((Lab, "answers"), (Lab, "run"), (recipe, "layer_statistics"), (recipe, "score_units")):
        monkeypatch.setattr(owner, name, interrupted)
    assert ran(all_run.study) == all_run.result


@pytest.mark.parametrize(
    ("change", "again"), [({"budget": BUDGET // 2}, set(SEARCHES)), ({"candidates": 2}, {"static"}), ({"workers": 3}, set())]
)
def test_other_terms_rerun_only_what_depends_on_them(all_run, here, tmp_path, change, again):
    study = shutil.copytree(all_run.study, tmp_path / "s")
    before = cells_of(study)
    ran(study, **change)
    after = cells_of(study)
    assert {key: after[key] for key in before} == before
    assert {cell["method"] for key, cell in after.items() if key not in before} == again


def test_another_agent_reruns_only_what_depends_on_it(all_run, here, tmp_path):
    study = shutil.copytree(all_run.study, tmp_path / "s")
    before, agent = cells_of(study), Decider(study).agent
    replace(agent, max_ratio=agent.max_ratio + 0.01).save(study / "agent.safetensors", layout_of(study))
    ran(study)
    again = {cell["method"] for key, cell in cells_of(study).items() if key not in before}
    assert again == {"dynamic", "static", *(f"{name}_on_predictor" for name in SEARCHES)}


def test_a_stopped_bench_goes_on(fitted, here, tmp_path, monkeypatch):
    study = copied(fitted, tmp_path / "s")
    methods, measure = ("uniform", "dynamic", "additive"), recipe.Bench.measure

    def stops(self, choices):
        return measure(self, choices) if len(calls) < 4 else interrupted()

    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(recipe.Bench, "measure", stops)
        calls = counted(patch, recipe.Bench, "measure")
        with pytest.raises(KeyboardInterrupt):
            ran(study, methods=methods)
    assert len(cells_of(study)) == 4
    calls = counted(monkeypatch, recipe.Bench, "measure")
    result = ran(study, methods=methods)
    assert len(calls) == 2 and len(result["rows"]) == 6


def test_two_studies_are_two_runs(fitted, here, tmp_path):
    studies = [copied(fitted, tmp_path / f"s{seed}", seed=seed) for seed in (0, 1)]
    result = ran(*studies, methods=("uniform", "random", "static"))
    assert result["seeds"] == [0, 1] and len(result["dense_ppl"]) == len(result["heldout"]) == 2
    assert len(result["rows"]) == 6
    for row in result["rows"]:
        assert row["runs"] == 2 and len(row["seeds"]) == 2
        assert row["method"] == "static" or set(row["worse"]) == {"mean", "blocks", "seeds"}
    kept = [{key: cell["kept"] for key, cell in cells_of(study).items()} for study in studies]
    assert kept[0]["uniform 0.2 "] == kept[1]["uniform 0.2 "]
    assert any(kept[0][key] != kept[1][key] for key in kept[0] if key.startswith("random"))


# --- refusals ---


@pytest.fixture
def never_loads(monkeypatch):
    monkeypatch.setattr(recipe, "load_for", interrupted)


def test_studies_of_different_models_are_refused(fitted, tmp_path, never_loads):
    studies = [copied(fitted, tmp_path / digest, digest=digest) for digest in ("a", "b")]
    with refuses(InputError) as caught:
        ran(*studies)
    assert str(studies[1]) in str(caught.value)


def test_a_study_in_use_is_refused(fitted, here, tmp_path):
    study = copied(fitted, tmp_path / "s")
    with locked(study), refuses(InUseError):
        ran(study, methods=("uniform",))
    assert not (study / "bench.json").exists()


def test_a_study_that_is_not_fitted_is_refused(fitted, tmp_path, never_loads):
    study = copied(fitted, tmp_path / "s")
    (study / "report.json").unlink()
    with refuses(InputError):
        ran(fitted.folder, study)


def test_studies_of_one_seed_are_refused(fitted, tmp_path, never_loads):
    with refuses(InputError) as caught:
        ran(*(copied(fitted, tmp_path / f"s{place}", seed=seed) for place, seed in enumerate((0, 1, 0))))
    assert "[0, 1, 0]" in str(caught.value)


@pytest.mark.parametrize("ratio", [0.99, -0.1, float("nan"), 1.0])
def test_a_ratio_that_cannot_be_is_refused(fitted, never_loads, ratio):
    with refuses(InputError):
        ran(fitted.folder, ratios=(0.2, ratio))


def test_an_unknown_method_is_refused_and_named(fitted, here, tmp_path):
    study = copied(fitted, tmp_path / "s")
    with refuses(InputError) as caught:
        ran(study, methods=("uniform", "unifrom"))
    assert "'unifrom'" in str(caught.value) and "evolution_on_predictor" in str(caught.value)
    assert not (study / "bench.json").exists()


def test_a_study_of_an_object_from_nowhere_is_refused(fitted, tmp_path):
    with refuses(InputError) as caught:
        ran(copied(fitted, tmp_path / "s"))
    assert "object" in str(caught.value)


def test_a_test_text_that_gives_no_number_is_said(fitted, here, tmp_path, monkeypatch):
    study = copied(fitted, tmp_path / "s")
    failed = Measurement(float("nan"), float("nan"), 0, 0.0, "no memory")
    monkeypatch.setattr(Lab, "answers", lambda self, masks, part, rows=None: [failed] * len(masks))
    with refuses(DamagedError) as caught:
        ran(study, methods=("uniform",))
    assert "no memory" in str(caught.value)
