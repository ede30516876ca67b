"""Static pruning: who the finalists are, and that search and validation text decide among them together."""

from types import SimpleNamespace

import numpy as np
import pytest

import ppf
import tiny_models
from builders import copied, interrupted, refuses
from fit_runs import SETTINGS
from learn_builders import IMPORTANCE, LAYOUT, allocations
from ppf.decide import Decider
from ppf.errors import ResourceError
from ppf.llm.engines.bench import InProcessEngine
from ppf.llm.text import Text
from ppf.progress import Progress
from ppf.recipes import refine as recipe
from ppf.recipes.lab import Lab
from ppf.recipes.refine import FINALISTS, _winner
from ppf.samples import Measurement

FAILED = Measurement(float("nan"), float("nan"), 0, 0.0, "no memory")


def study_at(folder):
    return ppf.Study(folder, tiny_models.model("llama-mha"), tiny_models.tokenizer())


@pytest.fixture
def study(fitted, tmp_path):
    return study_at(copied(fitted, tmp_path / "study"))


@pytest.fixture(scope="module")
def bare(place, tmp_path_factory):
    """A study whose text has no validation part."""
    return ppf.fit(
        tiny_models.model("llama-mha"), tokenizer=tiny_models.tokenizer(), study=tmp_path_factory.mktemp("bare") / "study",
        text=str(place / "text.txt"), quiet=True, **{**SETTINGS, "samples": 30, "rounds": 0, "validation_tokens": 0},
    )  # fmt: skip


def validated(monkeypatch, answer=None):
    """The masks that are measured on the validation text and what that gave, as they come."""
    seen, original = [], Lab.answers

    def answers(self, masks, part, rows=None, **more):
        found = original(self, masks, part, rows, **more)
        if part == "validation":
            found = answer(found) if answer else found
            seen.append(([tuple(mask.allocation.kept.tolist()) for mask in masks], found))
        return found

    monkeypatch.setattr(Lab, "answers", answers)
    return seen


def kept_of(decision):
    return tuple(decision.allocation.kept.tolist())


def measured(study):
    """Damage on the search text by allocation, of all that was measured and removes enough for a ratio and little more."""
    decider = Decider(study.folder)
    layout = decider.layout

    def fits(kept, ratio):
        over = (layout.units - np.array(kept)) @ layout.costs - ratio * layout.prunable
        return 0 <= over < layout.costs.min()

    samples = decider.study.store().all()
    return lambda ratio: {one.kept: one.kl for one in samples if fits(one.kept, ratio)}


# --- the choice alone ---


def choice(damage, fresh, search=100, validation=400):
    """Which of some allocations wins, by damages on search and on validation text."""
    answers = [Measurement(1.0, kl, 0, 0.0) for kl in fresh]
    asked = []

    def ask(masks, part, advance):
        asked.append((part, [tuple(mask.allocation.kept) for mask in masks]))
        return answers

    text = SimpleNamespace(search=np.zeros((search // 10, 10)), validation=np.zeros((validation // 10, 10)))
    progress = Progress(quiet=True)
    lab = SimpleNamespace(text=text, answers=ask, layout=LAYOUT, progress=progress, study=SimpleNamespace(importance=IMPORTANCE))
    kept = allocations(len(damage), 0.3, 0)
    found = _winner(lab, kept, np.array(damage))
    return int((kept == found).all(axis=1).argmax()), asked


@pytest.mark.parametrize(
    ("damage", "fresh", "sizes", "winner"),
    [
        ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1], (100, 400), 2),
        ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1], (400, 100), 0),
        ([0.1, 0.2, 0.3], [0.3, 0.12, 0.2], (100, 100), 1),
        ([0.1, 0.2, 0.3], [float("nan"), 0.9, 0.7], (100, 400), 2),
        ([0.2, 0.1, 0.3], [float("nan"), float("inf"), float("nan")], (100, 400), 0),
        ([0.2, 0.2], [0.1, 0.1], (100, 400), 0),
        ([0.4, 0.1, 0.3], [], (100, 0), 1),
        ([0.4], [], (100, 400), 0),
    ],
)
def test_the_least_damage_on_all_tokens_together_wins(damage, fresh, sizes, winner):
    found, asked = choice(damage, fresh, *sizes)
    assert found == winner
    assert [(part, len(masks)) for part, masks in asked] == ([("validation", len(damage))] if fresh else [])


# --- in a study ---


def test_the_finalists_are_the_agents_own_and_the_best_on_the_search_text(study, monkeypatch):
    seen = validated(monkeypatch)
    decision = study.prune(ratio=0.45, refine=True, candidates=6, device="cpu").decision
    ((finalists, answers),) = seen
    found, ours = measured(study)(0.45), kept_of(study.policy(ratio=0.45))
    assert len(set(finalists)) == len(finalists) <= FINALISTS and finalists[0] == ours
    assert set(finalists) - {ours} == set(sorted(set(found) - {ours}, key=found.get)[: FINALISTS - 1])
    text = Text.load(study.folder / "text.safetensors", Decider(study.folder).layout.fingerprint)
    total = [
        found[kept] * text.search.size + answer.kl * text.validation.size for kept, answer in zip(finalists, answers, strict=True)
    ]
    assert kept_of(decision) == finalists[int(np.argmin(total))]
    assert {answer.tokens for answer in answers} == {text.validation.size} and text.validation.size > text.search.size


@pytest.mark.parametrize("place_of_best", [0, 1, -1])
def test_a_planted_answer_on_the_validation_text_decides(study, monkeypatch, place_of_best):
    def planted(found):
        return [Measurement(1.0, 1.0 if place == place_of_best % len(found) else 9.0, 0, 0.0) for place in range(len(found))]

    seen = validated(monkeypatch, planted)
    pruned = study.prune(ratio=0.35, refine=True, candidates=8, device="cpu")
    ((finalists, _),) = seen
    assert kept_of(pruned.decision) == finalists[place_of_best] and pruned.plan["refined"]
    assert sum(parameter.numel() for parameter in pruned.model.parameters()) == pruned.decision.params[1]


def test_what_the_validation_text_says_is_not_learned(study, monkeypatch):
    seen = validated(monkeypatch)
    study.prune(ratio=0.35, refine=True, candidates=8, device="cpu")
    store, size = Decider(study.folder).study.store(), SETTINGS["search_tokens"]
    assert len(seen) == 1 and {one.tokens for one in store.all()} == {size}
    assert set(seen[0][0]) <= {one.kept for one in store.all()}


def test_a_study_without_validation_text_refines_on_the_search_text_alone(bare, monkeypatch):
    text = Text.load(bare.folder / "text.safetensors", Decider(bare.folder).layout.fingerprint)
    assert len(text.validation) == 0 and text.search.size == SETTINGS["search_tokens"]
    seen, damages = validated(monkeypatch), []
    for _ in range(2):
        decision = bare.prune(ratio=0.4, refine=True, candidates=4, device="cpu").decision
        found = measured(bare)(0.4)
        assert found[kept_of(decision)] == min(found.values()) and len(found) >= 4
        damages.append(found[kept_of(decision)])
    assert not seen and damages[1] <= damages[0]


def test_without_refining_nothing_is_measured_on_the_way_to_the_mask(study, monkeypatch):
    for name in ("answers", "run", "open_study"):
        monkeypatch.setattr(Lab, name, interrupted)
    monkeypatch.setattr(recipe, "refined", interrupted)
    pruned = study.prune(ratio=0.4, device="cpu")
    assert kept_of(pruned.decision) == kept_of(study.policy(ratio=0.4)) and not pruned.plan["refined"]


def test_candidates_that_cannot_be_measured_are_said(study, monkeypatch):
    monkeypatch.setattr(InProcessEngine, "measure", lambda self, masks, *_: ((place, FAILED) for place in range(len(masks))))
    with refuses(ResourceError) as caught:
        study.prune(ratio=0.4321, refine=True, candidates=2, device="cpu")
    assert "no memory" in str(caught.value)


def test_a_validation_text_that_gives_no_number_leaves_the_agents_own(study, monkeypatch):
    validated(monkeypatch, lambda found: [FAILED] * len(found))
    decision = study.prune(ratio=0.35, refine=True, candidates=4, device="cpu").decision
    assert kept_of(decision) == kept_of(study.policy(ratio=0.35))
