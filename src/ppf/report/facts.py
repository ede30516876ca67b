"""What a report tells, read from a study folder: measurements, predictions, tables. No plots, no HTML, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ppf.artifact import load_artifact, read_json
from ppf.decide import Decider
from ppf.errors import MEND, DamagedError
from ppf.learn.learning_curve import Known, learning_curve
from ppf.learn.predictor import Prediction
from ppf.provenance import own_name
from ppf.recipes.cells import current_cells
from ppf.recipes.summary import summarise
from ppf.samples import Sample, kept_matrix
from ppf.space.budget import largest_ratio
from ppf.space.layout import Layout
from ppf.study import StudyFolder

_NEEDED: dict[str, type | tuple[type, ...]] = {
    "predictor": str, "importance": dict, "heldout": dict, "samples": dict, "failed": int, "tokens": dict, "seconds": dict,
    "measuring_seconds": (int, float),
}  # fmt: skip
SHOWN_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FINE = 121


@dataclass(frozen=True)
class Table:
    """Methods on the bench.

    Attributes:
        model: Whose.
        text: On which they were compared.
        tokens: Of that text.
        samples: Of the fit.
        seeds: One a study.
        rows: As ``summarise`` gives them.
    """

    model: str
    text: str
    tokens: int
    samples: int
    seeds: tuple[int, ...]
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True, eq=False)
class Masks:
    """Measured masks beside what is predicted of them.

    Attributes:
        samples: What measuring gave.
        ratios: Float[N], the share of the prunable parameters that is gone.
        predicted: Of the same masks.
        rises: Float[N], measured log-perplexity above dense on the search text, nats/token.
    """

    samples: tuple[Sample, ...]
    ratios: np.ndarray
    predicted: Prediction
    rises: np.ndarray

    @property
    def damage(self) -> np.ndarray:
        """Float[N], measured, nats/token."""
        return np.array([sample.kl for sample in self.samples])


class Facts:
    """A fitted study, as a report needs it.

    Args:
        folder: The study folder.

    Raises:
        InputError: No study, or one that is not fitted.
        DamagedError: An artefact is not whole.
    """

    def __init__(self, folder: str | Path) -> None:
        self.decider = Decider(folder)
        self.study: StudyFolder = self.decider.study
        self.layout: Layout = self.decider.layout
        self.report: dict[str, Any] = _checked(self.study.folder / "report.json", self.decider.report)
        store = self.study.store()
        try:
            self._samples = store.all()
        finally:
            store.close()

    @property
    def dense_log_ppl(self) -> float:
        """Of the dense model on the search text, nats/token."""
        return float(self.study.record["dense"]["search"]["log_ppl"])

    @cached_property
    def max_ratio(self) -> float:
        """The largest ratio that the agent was trained on and that the floors allow."""
        return min(float(self.decider.agent.max_ratio), largest_ratio(self.layout))

    @property
    def shown_ratios(self) -> list[float]:
        """A few round ones within the range."""
        return [ratio for ratio in SHOWN_RATIOS if ratio <= self.max_ratio] or [round(self.max_ratio, 3)]

    def kept(self, ratios: Sequence[float]) -> np.ndarray:
        """Int[N, S]: what the agent keeps at each ratio."""
        return self.decider.agent.kept(np.array(ratios), self.layout)

    @cached_property
    def fine(self) -> tuple[np.ndarray, Prediction]:
        """Ratios from 0 to the largest, and what is predicted of the agent's policy at each."""
        ratios = np.linspace(0, self.max_ratio, _FINE)
        return ratios, self.decider.predict(self.kept(ratios.tolist()))

    def masks(self, *purposes: str) -> Masks:
        """Measured masks of some purposes."""
        samples = tuple(sample for sample in self._samples if sample.purpose in purposes)
        kept = kept_matrix(list(samples), self.layout)
        gone = (self.layout.units - kept) @ self.layout.costs / self.layout.prunable
        rises = np.array([sample.log_ppl for sample in samples]) - self.dense_log_ppl
        return Masks(samples, gone, self.decider.predictor.predict(kept), rises)

    @cached_property
    def learning(self) -> list[Known]:
        """The predictor's errors on the held-out masks as samples came in; empty where that cannot be told cheaply."""
        heldout = [sample for sample in self._samples if sample.purpose == "heldout"]
        if len(heldout) < 2:
            return []
        return learning_curve(self.decider.predictor, heldout, self.layout, self.dense_log_ppl)

    def probes(self, site: int) -> list[tuple[float, float]]:
        """Share of one site that was gone, and the damage that it did alone, from the least share up."""
        units = self.layout.sites[site].units
        found = {
            1 - sample.kept[site] / units: max(sample.kl, 0.0)
            for sample in self._samples
            if sample.purpose == "probe" and sample.kept[site] < units
        }
        return sorted(found.items())

    @cached_property
    def text_digest(self) -> str:
        """Checksum of the token blocks that everything was measured on."""
        return str(load_artifact(self.study.path("text"), "text", self.layout.fingerprint)[1]["sha256"])

    def own_table(self) -> Table | None:
        """The bench of this study alone, if one was run since it was fitted."""
        cells = current_cells(self.study)
        settings = self.study.record["settings"]
        if not cells:
            return None
        try:
            rows = tuple(summarise(cells, "static"))
        except (KeyError, TypeError, ValueError) as error:
            raise DamagedError(
                f"{self.study.folder}/bench.json must hold the cells of a bench; {error!r} came; remove it and run ppf bench again"
            ) from error
        text, tokens = settings.get("test_text") or settings.get("text"), self.study.record["dense"]["test"].get("tokens", 0)
        return Table(
            own_name(self.study.record["model"]["name"]), own_name(text), tokens, settings["samples"], (settings["seed"],), rows
        )


def table_of(path: str | Path) -> Table:
    """What ``ppf bench`` wrote into a file.

    Raises:
        DamagedError: It holds something else, or is missing.
    """
    record = read_json(Path(path))
    try:
        result = record["result"]
        rows = tuple({**row, "ratio": float(row["ratio"]), "above": float(row["above"])} for row in result["rows"])
        for row in rows:
            float(row["tokens"] + row["shared_tokens"] + row["regret"]), str(row["method"])
        facts = str(result["model"]), str(result["text"]), int(result["test_tokens"]), int(result["samples"])
        return Table(*facts, tuple(map(int, result["seeds"])), rows)
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedError(f"{path} must be a file that ppf bench wrote; {error!r} came; give another --bench") from error


def _checked(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    for name, kind in _NEEDED.items():
        if not isinstance(record.get(name), kind):
            raise DamagedError(f"{path} must be the report of a fit; it lacks {name!r}; {MEND}")
    if not {record["predictor"], "additive"} <= set(record["heldout"]):
        raise DamagedError(f"{path} must have the figures of its predictors; it has not; {MEND}")
    return record
