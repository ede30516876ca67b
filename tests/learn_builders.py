"""A made-up model whose damage is a formula, and the samples and the study that it gives. No language model."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from builders import importance, layout
from ppf.learn.agent import Agent
from ppf.learn.features import Curves
from ppf.learn.fit_predictor import Facts, fit_predictor
from ppf.learn.predictor import LEAN_NOISE, Predictor
from ppf.learn.process import NOISE, Points
from ppf.learn.train_nested import chain_of
from ppf.samples import Sample
from ppf.space.allocation import allocate
from ppf.space.budget import Budget
from ppf.space.layout import Layout
from ppf.space.policy import Policy
from ppf.study import StudyFolder

LAYOUT = layout(layers=4, heads=4, groups=4, ffn=48)
IMPORTANCE = importance(LAYOUT)
DENSE_LOG_PPL = 2.0
LEVELS = (0.9, 0.75, 0.5, 0.25, 0.0)
RATIOS = (0.2, 0.35, 0.5)


@dataclass(frozen=True, eq=False)
class Truth:
    """Damage of an allocation: convex for each site alone, and more or less than the sum for sites together.

    Attributes:
        of: Whose sites these are.
        weights: Float[S], damage of a whole site.
        powers: Float[S], how convex.
        pairs: Float[S, S], upper triangle: what two sites add to the sum, as a share of the root of their product.
    """

    of: Layout
    weights: np.ndarray
    powers: np.ndarray
    pairs: np.ndarray

    def single(self, kept: np.ndarray) -> np.ndarray:
        """Float[..., S] damages of each site alone."""
        return self.weights * (1 - kept / self.of.units) ** self.powers

    def __call__(self, kept: np.ndarray) -> np.ndarray:
        """Float[...] damages."""
        single = self.single(kept)
        root = np.sqrt(single)
        return np.maximum(single.sum(-1) + np.einsum("...i,ij,...j->...", root, self.pairs, root), 0.0)


def truth(seed: int = 0, strength: float = 1.0, of: Layout = LAYOUT) -> Truth:
    """A random one; ``strength`` 0 is a plain sum."""
    rng, sites = np.random.default_rng(seed), len(of.sites)
    pairs = np.triu(rng.choice([0.0, 2.0, -0.6], (sites, sites), p=[0.6, 0.25, 0.15]), 1)
    return Truth(of, rng.uniform(0.3, 3.0, sites), rng.uniform(1.2, 2.5, sites), strength * pairs)


def curves_of(of: Truth) -> Curves:
    """The single-site damages, known exactly."""
    units = np.array(of.of.units)
    table = [w * (1 - np.arange(u + 1) / u) ** p for w, u, p in zip(of.weights, units, of.powers, strict=True)]
    return Curves(units, np.concatenate(table))


def sample(of: Truth, kept: np.ndarray, purpose: str = "spread", ratio: float = 0.3, **changes: object) -> Sample:
    """What measuring an allocation gives; log-perplexity rises by 0.8 of the damage."""
    damage = float(of(kept))
    log_ppl, kept = DENSE_LOG_PPL + 0.8 * damage, tuple(kept.tolist())
    return replace(Sample("made up", str(kept), purpose, ratio, kept, b"", "done", "", log_ppl, damage, 100, 0.1), **changes)


def probes(of: Truth, levels: Iterable[float] = LEVELS) -> list[Sample]:
    """Each site alone at each level, without repetition."""
    samples = []
    for index, site in enumerate(of.of.sites):
        for count in sorted({max(site.floor, round(level * site.units)) for level in levels} - {site.units}, reverse=True):
            kept = of.of.units.copy()
            kept[index] = count
            samples.append(sample(of, kept, "probe"))
    return samples


def allocations(count: int, ratio: float, seed: int, scale: float = 0.2, of: Layout = LAYOUT) -> np.ndarray:
    """Int[count, S]: scattered ones of one size."""
    rng, budget = np.random.default_rng(seed), Budget.from_ratio(ratio, of)
    return np.array([allocate(Policy(rng.normal(0, scale, len(of.sites))), budget, of).kept for _ in range(count)])


def spread(of: Truth, count: int, seed: int = 0, purpose: str = "spread", ratios: Iterable[float] = RATIOS) -> list[Sample]:
    """So many scattered samples at each of a few ratios."""
    return [
        sample(of, kept, purpose, ratio)
        for index, ratio in enumerate(ratios)
        for kept in allocations(count, ratio, 100 * seed + index, of=of.of)
    ]


def plain_covariance(hyper: np.ndarray, scales: np.ndarray, first: Points, second: Points) -> np.ndarray:
    """Float[N, M]: the kernel of a process, pair by pair."""
    a, angle, size, b, c, d = hyper[:6]
    table = np.empty((len(first.sizes), len(second.sizes)))
    for i, j in np.ndindex(*table.shape):
        cosine = (first.directions[i] * second.directions[j]).sum()
        far = (((first.gone[i] - second.gone[j]) / scales) ** 2).sum()
        alike = np.exp(-(1 - cosine**2) / angle**2) * np.exp(-0.5 * ((first.sizes[i] - second.sizes[j]) / size) ** 2)
        together = np.mean([min(one, other) for one, other in zip(first.gone[i], second.gone[j], strict=True)])
        table[i, j] = a**2 * alike + b**2 * (1 + cosine**2) + c**2 * np.exp(-0.5 * far) + d**2 * together
    return table


def plain_inner(hyper: np.ndarray, scales: np.ndarray, seen: Points) -> np.ndarray:
    """Float[n, n]: covariance of measurements, their noise included."""
    return plain_covariance(hyper, scales, seen, seen) + np.diag(plain_noise(hyper, seen) + 1e-6)


def plain_noise(hyper: np.ndarray, points: Points) -> np.ndarray:
    """Float[N]: variance of the noise of a measurement."""
    return hyper[6] ** 2 + (hyper[7] * NOISE / np.exp(points.sizes)) ** 2


def plain_process(
    hyper: np.ndarray, scales: np.ndarray, seen: Points, target: np.ndarray, new: Points
) -> tuple[np.ndarray, np.ndarray]:
    """Float[N] both: mean and standard deviation by the textbook (Rasmussen and Williams, equations 2.25 and 2.26)."""
    inverse = np.linalg.inv(plain_inner(hyper, scales, seen))
    cross, own = plain_covariance(hyper, scales, new, seen), plain_covariance(hyper, scales, new, new)
    mean = hyper[8] + cross @ inverse @ (target - hyper[8])
    return mean, np.sqrt(np.diag(own - cross @ inverse @ cross.T) + plain_noise(hyper, new))


def planted_lean(kept: np.ndarray, of: Layout = LAYOUT) -> np.ndarray:
    """Float[N]: where attention goes more than the rest, log-perplexity rises more than the damage says."""
    gone = 1 - kept / of.units
    attention = np.array([site.kind == "attn" for site in of.sites])
    return 0.5 * (gone[:, attention].mean(axis=1) - gone[:, ~attention].mean(axis=1)) / np.maximum(gone.mean(axis=1), 1e-3)


def leant(samples: list[Sample]) -> list[Sample]:
    """The samples with the planted lean in their log-perplexity."""
    leans = planted_lean(np.array([one.kept for one in samples]))
    rises = [(one.log_ppl - DENSE_LOG_PPL + LEAN_NOISE) * np.exp(lean) for one, lean in zip(samples, leans, strict=True)]
    return [replace(one, log_ppl=DENSE_LOG_PPL + rise - LEAN_NOISE) for one, rise in zip(samples, rises, strict=True)]


def fitted(kind: str, of: Truth, count: int = 40, seed: int = 0) -> Predictor:
    """A predictor of all probes and so many scattered samples a ratio."""
    return fit_predictor(kind, probes(of) + spread(of, count, 1), [], LAYOUT, DENSE_LOG_PPL, seed)


def facts(of: Truth, kept: np.ndarray, lean: float = 0.3) -> Facts:
    """Of allocations whose damage is known; all lean alike."""
    return Facts(curves_of(of), kept, of(kept), np.full(len(kept), lean), 0)


def fitted_study(folder: Path, predictor: Predictor, agent: Agent) -> StudyFolder:
    """The folder that a fit leaves, as far as decisions need it."""
    folder.mkdir()
    record = {
        "model": {"name": "made up", "digest": "0", "bytes_per_param": 2},
        "layout": LAYOUT.to_json(),
        "settings": {},
        "dense": {"search": {"log_ppl": DENSE_LOG_PPL}, "test": {"log_ppl": 2.5}},
        "context": "made up",
        "seq_len": 16,
        "dtype": "float32",
    }
    study = StudyFolder.create(folder, record)
    IMPORTANCE.save(study.path("importance"), LAYOUT)
    predictor.save(study.path("predictor"), LAYOUT)
    agent.save(study.path("agent"), LAYOUT)
    chain_of(agent, LAYOUT).save(study.path("nested"))
    (folder / "report.json").write_text("{}")
    return study
