"""What does the demo give, and how long does each stage take?"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does

import argparse
import tempfile
import time
from pathlib import Path

from ppf.artifact import read_json
from ppf.config import DemoConfig
from ppf.progress import Progress
from ppf.recipes.demo import demo
from record import write


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=None, help="keep the study here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or f"{temporary}/demo"
        start = time.perf_counter()
        rows = demo(DemoConfig(out, seed=arguments.seed), Progress())
        wall = time.perf_counter() - start
        report = read_json(Path(out) / "report.json")
    rows = [{**row, "folder": Path(row["folder"]).name} for row in rows]
    kept = ("predictor", "cross_validated_tau", "heldout", "samples", "failed", "tokens", "measuring_seconds", "seconds")
    write("demo", arguments.seed, {"wall_seconds": round(wall, 1), "rows": rows, **{name: report[name] for name in kept}})


if __name__ == "__main__":
    main()
