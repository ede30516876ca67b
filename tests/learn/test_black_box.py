import sys
from dataclasses import replace

import numpy as np
import pytest

from builders import layout, refuses
from learn_builders import LAYOUT, truth
from ppf.errors import ResourceError
from ppf.learn.black_box import SEARCHES, Problem, _switched, evolution, random_search
from ppf.space.allocation import allocate, allocate_many
from ppf.space.budget import Budget
from ppf.space.policy import Policy

GENERATION = {"random": 0, "evolution": 33, "cma": 20}
"""Questions that a search may ask beyond what it was given, as it asks them together."""


@pytest.fixture(params=list(SEARCHES))
def name(request):
    if request.param == "cma":
        pytest.importorskip("cma", exc_type=ImportError)
    return request.param


pytestmark = pytest.mark.filterwarnings("ignore:Could not import matplotlib")


class Asked:
    """An objective that remembers its questions, and answers a damage or that there is none."""

    def __init__(self, of, fails=lambda kept: np.zeros(len(kept), dtype=bool)):
        self.of, self.fails, self.groups = of, fails, []

    def __call__(self, kept):
        assert kept.ndim == 2 and kept.dtype == np.int64
        self.groups.append(kept.copy())
        return np.where(self.fails(kept), np.inf, self.of(kept))

    @property
    def kept(self):
        return np.concatenate(self.groups)


def problem(*objectives, costs=(1.0,), ratio=0.4, evaluations=300, seed=0, of=LAYOUT):
    start = np.full(len(of.sites), 1 - ratio)
    tiers = tuple(zip(objectives, costs, strict=True))
    return Problem(tiers, of, Budget.from_ratio(ratio, of).remove, start, evaluations, seed)


def start_of(asked):
    return asked.allocated(asked.start[None])[0]


def meets(kept, asked):
    over = (asked.layout.units - kept) @ asked.layout.costs - asked.remove
    return (kept >= asked.layout.floors) & (kept <= asked.layout.units) & (over >= 0) & (over < asked.layout.costs.min())


@pytest.mark.parametrize("ratio", [0.05, 0.4, 0.8])
def test_all_that_is_asked_and_found_meets_the_budget(name, ratio):
    objective = Asked(truth())
    asked = problem(objective, ratio=ratio)
    found = SEARCHES[name](asked)
    assert meets(found, asked).all()
    assert all(meets(kept, asked).all() for kept in objective.kept)


@pytest.mark.parametrize("seed", range(3))
def test_a_planted_optimum_is_approached_and_what_is_found_is_the_best_of_the_asked(name, seed):
    objective = Asked(truth(seed))
    asked = problem(objective, seed=seed)
    found = SEARCHES[name](asked)
    scores = truth(seed)(objective.kept)
    assert truth(seed)(found) == scores.min() < 0.9 * truth(seed)(start_of(asked))
    assert (objective.groups[0] == start_of(asked)).all(axis=1).any()


@pytest.mark.parametrize("evaluations", [0.4, 1, 2, 40])
def test_a_start_that_nothing_beats_is_kept(name, evaluations):
    asked = problem(truth(), evaluations=evaluations)
    best = start_of(asked)
    objective = Asked(lambda kept: np.abs(kept - best).sum(axis=1) * 1.0)
    found = SEARCHES[name](replace(asked, tiers=((objective, 1.0),)))
    np.testing.assert_array_equal(found, best)


def test_a_seed_gives_one_answer_and_another_seed_other_questions(name):
    questions, answers = [], []
    for seed in (3, 3, 4):
        objective = Asked(truth())
        answers.append(SEARCHES[name](problem(objective, seed=seed)))
        questions.append(objective.kept)
    np.testing.assert_array_equal(questions[0], questions[1])
    np.testing.assert_array_equal(answers[0], answers[1])
    assert questions[0].shape != questions[2].shape or (questions[0] != questions[2]).any()


def test_global_randomness_is_neither_read_nor_moved(name):
    np.random.seed(1)
    before = np.random.get_state()[1:3]
    first = SEARCHES[name](problem(truth(), evaluations=60))
    after = np.random.get_state()[1:3]
    assert (before[0] == after[0]).all() and before[1] == after[1]
    np.random.seed(2)
    np.testing.assert_array_equal(first, SEARCHES[name](problem(truth(), evaluations=60)))


@pytest.mark.parametrize("evaluations", [1, 33, 100.5, 200])
def test_questions_stay_within_what_may_be_spent_and_one_generation(name, evaluations):
    objective = Asked(truth())
    SEARCHES[name](problem(objective, evaluations=evaluations))
    count = len(objective.kept)
    assert count < evaluations + max(GENERATION[name], 1)
    assert count > 0.5 * evaluations or count >= 100  # a search may have converged


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_allocations_without_a_damage_are_never_chosen(name, share):
    def fails(kept):
        return (kept.sum(axis=1) % 10) < 10 * share

    objective = Asked(truth(), fails)
    asked = problem(objective, evaluations=120)
    found = SEARCHES[name](asked)
    if share == 1:
        np.testing.assert_array_equal(found, start_of(asked))
    else:
        assert not fails(found[None])[0]


def test_random_search_asks_exactly_what_it_may_the_start_first():
    objective = Asked(truth())
    asked = problem(objective, evaluations=77.9)
    random_search(asked)
    assert len(objective.kept) == 77
    np.testing.assert_array_equal(objective.kept[0], start_of(asked))


# --- evolution ---


COSTS = (1 / 8, 1 / 2, 1.0)


def tiers(dear=None, cheap=None):
    of = truth()
    return [Asked(cheap or of), Asked(cheap or of), Asked(dear or of)]


def test_evolution_asks_the_cheap_objective_much_and_the_dear_one_little():
    asked = tiers()
    evolution(problem(*asked, costs=COSTS, evaluations=100))
    assert all(20 <= len(group) <= 32 for group in asked[0].groups)
    assert {len(group) for group in asked[1].groups} == {8}
    assert {len(group) for group in asked[2].groups} == {3}
    assert len(asked[0].groups) == len(asked[1].groups) == len(asked[2].groups)


def test_evolutions_survivors_are_the_best_of_the_tier_before():
    asked = tiers()
    evolution(problem(*asked, costs=COSTS, evaluations=60))
    for many, some, few in zip(*(tier.groups for tier in asked), strict=True):
        assert truth()(some).max() <= np.sort(truth()(many))[7]
        assert truth()(few[1:]).max() <= np.sort(truth()(some))[1]


def test_evolutions_cost_counts_each_tier_by_its_share():
    for evaluations in (5, 11, 12, 100):
        asked = tiers()
        evolution(problem(*asked, costs=COSTS, evaluations=evaluations))
        groups = list(zip(*(tier.groups for tier in asked), strict=True))
        spent = [sum(len(kept) * cost for kept, cost in zip(group, COSTS, strict=True)) for group in groups]
        assert sum(spent[:-1]) < evaluations <= sum(spent)


def test_evolutions_parent_has_to_pass_the_last_objective_itself():
    """Where the cheap objectives lie, nothing worse than the start gets through."""
    of = truth()
    asked = tiers(cheap=lambda kept: -of(kept))
    wanted = problem(*asked, costs=COSTS, evaluations=150)
    found = evolution(wanted)
    parents = np.array([group[0] for group in asked[2].groups])
    np.testing.assert_array_equal(parents[0], start_of(wanted))
    assert (np.diff(of(parents)) <= 0).all() and of(found) <= of(parents[-1])


def test_evolutions_last_tier_is_known_by_its_place_not_by_its_cost():
    """On a text of one block every tier costs the same."""
    asked = tiers()
    found = evolution(problem(*asked, costs=(1.0, 1.0, 1.0), evaluations=300))
    assert {len(group) for group in asked[1].groups} == {8} and {len(group) for group in asked[2].groups} == {3}
    assert truth()(found) == truth()(asked[2].kept).min()


@pytest.mark.parametrize("of", [LAYOUT, layout()])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_a_switch_moves_parameters_between_a_few_sites_and_stays_in_budget(of, ratio):
    rng, budget = np.random.default_rng(0), Budget.from_ratio(ratio, of)
    kept = allocate(Policy(rng.normal(0, 0.1, len(of.sites))), budget, of).kept
    dense = of.units * of.costs
    wishes = np.array([_switched(kept, of, rng) for _ in range(200)])
    moved = (wishes - kept / of.units) * dense
    np.testing.assert_allclose(moved.sum(axis=1), 0, atol=1e-6 * dense.sum())
    sites = (np.abs(moved) > 1e-9 * dense.sum()).sum(axis=1)
    assert sites.max() <= 6 and np.median(sites) == 2
    found = allocate_many(wishes, np.full(200, budget.remove), of)
    over = (of.units - found) @ of.costs - budget.remove
    assert (over >= 0).all() and (over < of.costs.min()).all()
    assert len(np.unique(found, axis=0)) > 10
    kinds = np.array([site.kind for site in of.sites])
    for kind in ("attn", "ffn"):  # both kinds give and take, where there is something
        here = kinds == kind
        assert (found < kept)[:, here].any() == (kept > of.floors)[here].any()
        assert (found > kept)[:, here].any() == (kept < of.units)[here].any()


def test_a_search_leaves_the_start_as_it_was(name):
    asked = problem(truth(), evaluations=50)
    asked.start.flags.writeable = False
    SEARCHES[name](asked)
    np.testing.assert_array_equal(asked.start, np.full(len(LAYOUT.sites), 0.6))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cma", None)
    objective = Asked(truth())
    with refuses(ResourceError) as caught:
        SEARCHES["cma"](problem(objective))
    assert "cma" in str(caught.value) and "pip install" in str(caught.value) and not objective.groups
