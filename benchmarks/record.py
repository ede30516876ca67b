"""Writes what a benchmark saw, with everything needed to see it again, to benchmarks/results/."""

import json
from pathlib import Path
from typing import Any

from ppf.provenance import provenance

HERE = Path(__file__).parent


def write(name: str, seed: int, result: dict[str, Any]) -> Path:
    """One results file.

    Args:
        name: Of the benchmark.
        seed: That it ran with.
        result: What it saw.
    """
    record = {**provenance(), "seed": seed, "result": result}
    path = HERE / "results" / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path.relative_to(HERE.parent)} written")
    return path
