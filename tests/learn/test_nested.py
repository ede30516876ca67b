import numpy as np
import pytest

from builders import layout, refuses
from learn_builders import LAYOUT, curves_of, truth
from ppf.artifact import save_artifact
from ppf.errors import DamagedError, InputError
from ppf.learn.agent import Agent
from ppf.learn.baselines import knapsack
from ppf.learn.nested import Chain, whole_order
from ppf.learn.train_agent import AgentConfig, train_agent
from ppf.learn.train_nested import chain_of, nest
from ppf.space.budget import aligned_floors, unit_steps

FREE = LAYOUT.units - LAYOUT.floors
MOST = int(FREE @ LAYOUT.costs)
REMOVE = np.unique(np.append(np.random.default_rng(0).integers(0, MOST, 300), [0, 1, MOST]))
LOW, HIGH = 0.05, 0.65


def chunks(parts=16):
    return np.array([1 if site.kind == "attn" else -(-int(free) // parts) for site, free in zip(LAYOUT.sites, FREE, strict=True)])


def chain(seed=0, parts=16):
    """Any order."""
    wide = chunks(parts)
    return Chain(np.random.default_rng(seed).permutation(whole_order(FREE, wide)), wide, LAYOUT)


def additive(of):
    return Agent(knapsack(curves_of(of), LAYOUT).astype(np.float32), np.array(HIGH))


@pytest.fixture(scope="module")
def taught():
    """A truth with strong interactions, the agent that learnt it, and nested policies made of its own."""
    of = truth(3)
    agent = train_agent(additive(of), of, LAYOUT, LOW, HIGH, 0, AgentConfig(steps=60))
    return of, agent, nest(agent, of, LAYOUT, LOW, HIGH, 0, steps=200)


def log_damage(of, kept):
    return np.log(of(kept) + 0.01).mean()


@pytest.mark.parametrize("grid", [(1, 1), (4, 1), (16, 1), (1, 2), (16, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_what_is_gone_stays_gone(seed, grid):
    kept = chain(seed).kept(REMOVE[REMOVE <= 0.6 * MOST], *grid)
    assert (np.diff(kept, axis=0) <= 0).all()
    assert (kept >= LAYOUT.floors).all() and (kept <= LAYOUT.units).all()


@pytest.mark.parametrize("parts", [1, 5, 16, 100])
def test_units_go_one_by_one_in_the_order_of_the_chunks_until_the_budget_is_met(parts):
    one = chain(parts=parts)
    for remove, found in zip(REMOVE.tolist(), one.kept(REMOVE), strict=True):
        kept = LAYOUT.units.copy()
        for site in one.order:
            for _ in range(min(int(one.chunks[site]), int(kept[site] - LAYOUT.floors[site]))):
                if (LAYOUT.units - kept) @ LAYOUT.costs < remove:
                    kept[site] -= 1
        np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("grid", [(4, 1), (16, 1), (1, 2), (16, 2)])
def test_on_a_grid_units_go_in_whole_steps_and_budgets_are_met_to_within_one(grid):
    floors, steps = aligned_floors(LAYOUT, *grid), unit_steps(LAYOUT, *grid)
    remove = REMOVE[(LAYOUT.units - floors) @ LAYOUT.costs >= REMOVE]
    kept = chain().kept(remove, *grid)
    assert ((kept % steps == 0) | (kept == LAYOUT.units)).all() and (kept >= floors).all()
    over = (LAYOUT.units - kept) @ LAYOUT.costs - remove
    assert (over >= 0).all() and (over < (steps * LAYOUT.costs).max()).all()
    with refuses(InputError):
        chain().kept(np.array([MOST]), *grid)


def test_nothing_is_asked_and_everything_goes():
    one = chain()
    np.testing.assert_array_equal(one.kept(np.array([0, MOST])), [LAYOUT.units, LAYOUT.floors])
    with refuses(InputError):
        one.kept(np.array([0, MOST + 1]))


def test_the_order_says_who_goes_first():
    one = chain()
    first = one.order[0]
    kept = one.kept(np.array([1]))[0]
    assert (LAYOUT.units - kept)[first] == 1 and (LAYOUT.units - kept).sum() == 1


def test_a_chain_of_nested_policies_is_near_them():
    of = truth(strength=0)
    agent = additive(of)  # of convex single-site damages alone: nearly nested as they are
    ratios, remove = np.linspace(LOW, HIGH, 40), (np.linspace(LOW, HIGH, 40) * LAYOUT.prunable).astype(int)
    free, nested = agent.kept(ratios, LAYOUT), chain_of(agent, LAYOUT).kept(remove)
    assert log_damage(of, nested) - log_damage(of, free) < 0.2 < log_damage(of, chain().kept(remove)) - log_damage(of, free)


def test_searching_lowers_the_damage_and_cannot_beat_free_policies_by_much(taught):
    of, agent, nested = taught
    remove = (np.linspace(LOW, HIGH, 40) * LAYOUT.prunable).astype(int)
    free = log_damage(of, agent.kept(np.linspace(LOW, HIGH, 40), LAYOUT))
    before, after = (log_damage(of, one.kept(remove)) for one in (chain_of(agent, LAYOUT), nested))
    assert free - 0.02 < after < before - 0.02


def test_a_search_moves_chunks_and_loses_none(taught):
    _, agent, nested = taught
    for one in (chain_of(agent, LAYOUT), nested):
        np.testing.assert_array_equal(np.sort(one.order), whole_order(FREE, one.chunks))
        np.testing.assert_array_equal(one.kept(np.array([MOST]))[0], LAYOUT.floors)


def test_a_search_asks_only_for_ratios_between_the_places():
    of, asked = truth(), []

    def objective(kept):
        asked.append(len(kept))
        return of(kept)

    nest(additive(of), objective, LAYOUT, LOW, HIGH, 0, steps=30)
    assert asked[0] == 128 and np.mean(asked[1:]) < 0.5 * 16 * 128


def test_a_seed_repeats_itself_and_progress_never_falls(taught):
    of, agent, nested = taught
    gains = []
    again = nest(agent, of, LAYOUT, LOW, HIGH, 0, steps=200, advance=gains.append)
    np.testing.assert_array_equal(again.order, nested.order)
    assert len(gains) == 200 and gains[0] >= 0 and (np.diff(gains) >= 0).all()


def test_what_is_saved_reloads_the_same(tmp_path):
    one = chain()
    one.save(tmp_path / "nested.safetensors")
    other = Chain.load(tmp_path / "nested.safetensors", LAYOUT)
    np.testing.assert_array_equal(other.order, one.order)
    np.testing.assert_array_equal(other.kept(REMOVE), one.kept(REMOVE))
    with refuses(DamagedError):
        Chain.load(tmp_path / "nested.safetensors", layout(layers=2))


def test_a_file_that_holds_no_whole_order_is_refused(tmp_path):
    order, wide = chain().order, chunks()
    damaged = [
        {"chunks": wide},
        {"order": order},
        {"order": order[:-1], "chunks": wide},
        {"order": np.where(order == 1, 0, order), "chunks": wide},
        {"order": order + 100, "chunks": wide},
        {"order": order, "chunks": wide * 0},
        {"order": order, "chunks": wide[:-1]},
    ]
    for arrays in damaged:
        save_artifact(tmp_path / "a", "nested", LAYOUT.fingerprint, arrays)
        with refuses(DamagedError):
            Chain.load(tmp_path / "a", LAYOUT)
