import numpy as np
import pytest
from scipy import stats

from ppf.recipes.summary import summarise

RATIOS = (0.2, 0.4)
METHODS = ("uniform", "dynamic", "static")


def cells(seeds=(0, 1, 2), blocks=40, methods=METHODS, ratios=RATIOS):
    """Made-up ones; the seeds of a study share their blocks."""
    rng, made = np.random.default_rng(5), []
    for seed in seeds:
        hard = rng.gamma(2, 0.1, blocks)
        for ratio in ratios:
            for place, method in enumerate(methods):
                above = ratio * (hard + 0.3 - 0.1 * place) + rng.normal(0, 0.01, blocks)
                made.append({
                    "method": method, "ratio": ratio, "seed": seed, "above": above.tolist(), "kl": (above / 2).tolist(),
                    "tokens": 1000 * seed + place, "shared_tokens": 7 * place, "seconds": float(seed),
                })  # fmt: skip
    return made


def of(made, method, ratio):
    return [cell for cell in made if (cell["method"], cell["ratio"]) == (method, ratio)]


def row(rows, method, ratio):
    (found,) = of(rows, method, ratio)
    return found


def test_there_is_one_row_a_method_and_ratio_in_the_order_of_the_cells():
    rows = summarise(cells(), "static")
    assert [(row["ratio"], row["method"]) for row in rows] == [(ratio, method) for ratio in RATIOS for method in METHODS]
    assert {row["runs"] for row in rows} == {3}


def test_figures_are_means_over_seeds_and_blocks():
    made = cells()
    for found in summarise(made, "static"):
        group = of(made, found["method"], found["ratio"])
        assert found["above"] == pytest.approx(np.array([cell["above"] for cell in group]).mean())
        assert found["kl"] == pytest.approx(np.array([cell["kl"] for cell in group]).mean())
        for name in ("tokens", "shared_tokens", "seconds"):
            assert found[name] == pytest.approx(np.mean([cell[name] for cell in group]))


def test_seeds_count_alike_however_many_blocks_they_have():
    made = [*cells((0,), blocks=10, methods=("a",), ratios=(0.2,)), *cells((1,), blocks=30, methods=("a",), ratios=(0.2,))]
    (found,) = summarise(made, "a")
    assert found["above"] == pytest.approx(np.mean([np.mean(cell["above"]) for cell in made]))


def test_regret_is_what_the_best_at_a_ratio_would_save():
    made = cells()
    rows = summarise(made, "static")
    for ratio in RATIOS:
        means = {method: np.mean([cell["above"] for cell in of(made, method, ratio)]) for method in METHODS}
        for method in METHODS:
            assert row(rows, method, ratio)["regret"] == pytest.approx(means[method] - min(means.values()), abs=1e-12)
        assert sum(one["regret"] == 0 for one in rows if one["ratio"] == ratio) == 1
        assert min(one["regret"] for one in rows if one["ratio"] == ratio) == 0


def test_differences_are_taken_on_the_same_blocks_of_the_same_seed():
    made = cells()
    rows = summarise(list(reversed(made)), "static")
    for ratio in RATIOS:
        for method in ("uniform", "dynamic"):
            theirs = np.array([cell["above"] for cell in of(made, method, ratio)])
            ours = np.array([cell["above"] for cell in of(made, "static", ratio)])
            worse = row(rows, method, ratio)["worse"]
            assert worse["mean"] == pytest.approx((theirs - ours).mean())
            low, high = worse["seeds"]
            expected = stats.t.interval(0.95, 2, (theirs - ours).mean(axis=1).mean(), stats.sem((theirs - ours).mean(axis=1)))
            assert (low, high) == pytest.approx(expected)
        assert "worse" not in row(rows, "static", ratio)


def test_the_best_method_is_told_by_what_the_others_lie_behind_it():
    rows = summarise(cells(), "uniform")
    for ratio in RATIOS:
        assert "behind" not in row(rows, "static", ratio)
        for method in ("uniform", "dynamic"):
            found = row(rows, method, ratio)
            assert found["behind"]["mean"] == pytest.approx(found["regret"]) and found["behind"]["seeds"][0] > 0
    assert row(rows, "dynamic", 0.4)["worse"]["mean"] < 0 < row(rows, "dynamic", 0.4)["behind"]["mean"]


def test_pairing_takes_what_the_blocks_share_out_of_the_interval():
    found = row(summarise(cells(), "static"), "uniform", 0.4)
    width, paired = (high - low for low, high in (found["blocks"], found["worse"]["blocks"]))
    assert paired < width / 2
    assert found["worse"]["blocks"][0] > 0


def test_without_the_method_to_compare_with_no_row_says_worse():
    assert not any("worse" in found for found in summarise(cells(methods=("uniform", "dynamic")), "static"))
    some = [cell for cell in cells() if cell["method"] != "static" or cell["ratio"] == 0.2]
    assert {found["ratio"] for found in summarise(some, "static") if "worse" in found} == {0.2}


def test_a_seed_without_the_method_to_compare_with_is_left_out_of_the_difference():
    made = [cell for cell in cells() if cell["method"] != "static" or cell["seed"] != 2]
    found = row(summarise(made, "static"), "uniform", 0.2)
    pairs = [(one, other) for one in of(made, "uniform", 0.2) for other in of(made, "static", 0.2) if one["seed"] == other["seed"]]
    assert found["runs"] == 3 and len(pairs) == 2
    assert found["worse"]["mean"] == pytest.approx(np.mean([np.subtract(one["above"], other["above"]) for one, other in pairs]))


def test_one_seed_has_no_interval_over_seeds():
    rows = summarise(cells(seeds=(4,)), "static")
    assert all(found["runs"] == 1 and found["seeds"] is None for found in rows)
    assert all(found["worse"]["seeds"] is None for found in rows if found["method"] != "static")


def test_the_interval_over_seeds_is_students():
    made = cells(seeds=range(5))
    for found in summarise(made, "static"):
        means = [np.mean(cell["above"]) for cell in of(made, found["method"], found["ratio"])]
        assert tuple(found["seeds"]) == pytest.approx(stats.t.interval(0.95, 4, np.mean(means), stats.sem(means)))


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2, 3)])
def test_the_interval_over_blocks_is_about_two_standard_errors(seeds):
    made = cells(seeds, blocks=200)
    for found in summarise(made, "static"):
        runs = np.array([cell["above"] for cell in of(made, found["method"], found["ratio"])])
        error = np.sqrt((runs.var(axis=1) / 200).sum()) / len(runs)
        expected = (runs.mean() - 1.96 * error, runs.mean() + 1.96 * error)
        assert tuple(found["blocks"]) == pytest.approx(expected, abs=0.25 * error)


def test_the_same_cells_give_the_same_rows_and_stay_as_they_were():
    made = cells()
    assert summarise(made, "static") == summarise(made, "static")
    assert made == cells()
