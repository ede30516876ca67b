"""What the cells of a bench say: means, intervals over blocks and over seeds, paired differences, regret, cost."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import t as student

_DRAWS = 2000


def summarise(cells: Sequence[dict[str, Any]], against: str) -> list[dict[str, Any]]:
    """One row per method and ratio.

    Args:
        cells: Of all seeds, as ``bench`` gives them.
        against: The method with which the others are compared; left out of the rows where it was not run.

    Returns:
        Rows in the order of the cells: ``above`` and ``kl``, nats/token, means over seeds and blocks; ``blocks`` and ``seeds``,
        95 % intervals of ``above``, bootstrapped over the blocks of each seed and Student's over the seeds (None with one);
        ``worse``, by how much it is above ``against`` on the same blocks, with its intervals, and ``behind``, the same of the
        best method at that ratio, each left out of that method's own row; ``regret``, the mean of the latter, 0 for the best;
        ``tokens`` for this ratio and ``shared_tokens`` for all ratios, means over seeds.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], cell["ratio"]), []).append(cell)
    means = {key: float(np.mean([np.mean(cell["above"]) for cell in group])) for key, group in groups.items()}
    rows = []
    for (method, ratio), group in groups.items():
        best = min((mean, other) for (other, at), mean in means.items() if at == ratio)
        row: dict[str, Any] = {
            "method": method,
            "ratio": ratio,
            "runs": len(group),
            "above": means[method, ratio],
            "blocks": _over_blocks([np.array(cell["above"]) for cell in group]),
            "seeds": _over_seeds([float(np.mean(cell["above"])) for cell in group]),
            "kl": float(np.mean([np.mean(cell["kl"]) for cell in group])),
            "regret": means[method, ratio] - best[0],
            "tokens": float(np.mean([cell["tokens"] for cell in group])),
            "shared_tokens": float(np.mean([cell["shared_tokens"] for cell in group])),
            "seconds": float(np.mean([cell["seconds"] for cell in group])),
        }
        for name, other in (("worse", against), ("behind", best[1])):
            if pairs := _pairs(group, groups.get((other, ratio), [])) if method != other else []:
                seeds = _over_seeds([float(pair.mean()) for pair in pairs])
                row[name] = {"mean": float(np.mean([pair.mean() for pair in pairs])), "blocks": _over_blocks(pairs), "seeds": seeds}
        rows.append(row)
    return rows


def _pairs(cells: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """Per seed that both have Float[B]: by how much each block of the one is above that of the other."""
    known = {cell["seed"]: cell["above"] for cell in others}
    return [np.subtract(cell["above"], known[cell["seed"]]) for cell in cells if cell["seed"] in known]


def _over_blocks(runs: Sequence[np.ndarray]) -> list[float]:
    """95 % interval of the mean over runs of the means over blocks; blocks are drawn again within each run."""
    rng = np.random.default_rng(0)
    means = [run[rng.integers(0, len(run), (_DRAWS, len(run)))].mean(axis=1) for run in runs]
    ends: np.ndarray = np.quantile(np.mean(means, axis=0), [0.025, 0.975])
    return ends.tolist()


def _over_seeds(values: Sequence[float]) -> list[float] | None:
    """95 % interval of the mean over seeds, Student's; None with a single one."""
    if len(values) < 2:
        return None
    reach = float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values)))
    return [float(np.mean(values)) - reach, float(np.mean(values)) + reach]
