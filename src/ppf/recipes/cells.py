"""The cells that a bench leaves in a study, and which of them still hold. No model, no torch."""

import hashlib
from typing import Any

from ppf.artifact import read_json
from ppf.config import BenchConfig
from ppf.errors import DamagedError
from ppf.learn.black_box import SEARCHES
from ppf.study import StudyFolder


def current_cells(study: StudyFolder) -> list[dict[str, Any]]:
    """The cells of a study that its present predictor and policies gave; none if it has no bench.

    Where a method ran on several terms at one ratio, what a plain ``ppf bench`` gives counts, else the newest.

    Raises:
        DamagedError: Its file of cells holds something else.
    """
    path, taught, plain = study.folder / "bench.json", taught_by(study), BenchConfig((str(study.folder),))
    cells = read_json(path) if path.is_file() else {}
    found: dict[tuple[str, float], dict[str, Any]] = {}
    usual = set()
    try:
        for key, cell in cells.items():
            name, ratio = cell["method"], cell["ratio"]
            if not (key.startswith(f"{name} {ratio!r} ") and key.endswith(_learnt(name, taught))) or (name, ratio) in usual:
                continue
            found[name, ratio] = cell
            if key == cell_key(name, ratio, plain, taught):
                usual.add((name, ratio))
    except (AttributeError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} must hold the cells of a bench; {error!r} came; remove it and run ppf bench again") from error
    return list(found.values())


def cell_key(name: str, ratio: float, config: BenchConfig, taught: dict[str, str]) -> str:
    """What a cell is kept under: a method, a ratio, and what else its figures depend on."""
    return f"{name} {ratio!r} {_terms(name, config, taught)}"


def taught_by(study: StudyFolder) -> dict[str, str]:
    """Short hashes of what was fitted, and what it measured; a study that is fitted again gives other cells."""
    files = {name: study.path(name).read_bytes() for name in ("predictor", "agent", "nested")}
    parts = {"agent": files["predictor"] + files["agent"], "nested": files["nested"]}
    hashes = {name: hashlib.sha256(part).hexdigest()[:8] for name, part in parts.items()}
    return {**hashes, "budget": str(study.report["tokens"]["measured"])}


def _terms(name: str, config: BenchConfig, taught: dict[str, str]) -> str:
    if name in SEARCHES:
        return f"budget {config.budget or taught['budget']}"
    return (f"candidates {config.candidates} " if name == "static" else "") + _learnt(name, taught)


def _learnt(name: str, taught: dict[str, str]) -> str:
    if name in ("static", "dynamic") or name.endswith("_on_predictor"):
        return f"of {taught['agent']}"
    return f"of {taught['nested']}" if name == "nested" else ""
