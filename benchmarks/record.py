"""Writes what a benchmark saw, with everything needed to see it again, to benchmarks/results/."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def write(name: str, seed: int, result: dict[str, Any]) -> Path:
    """One results file.

    Args:
        name: Of the benchmark.
        seed: That it ran with.
        result: What it saw.
    """
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":!/benchmarks/results", ":!/docs")
    record = {
        "command": " ".join(["python", os.path.relpath(sys.argv[0], HERE.parent), *map(_inside, sys.argv[1:])]),
        "seed": seed,
        "commit": _git("rev-parse", "HEAD") + ("-dirty" if changed else ""),
        "machine": machine(),
        "result": result,
    }
    path = HERE / "results" / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{path.relative_to(HERE.parent)} written")
    return path


def machine() -> dict[str, Any]:
    """CPU, cores, threads and versions."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "transformers", "numpy", "scipy")
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


def _inside(argument: str) -> str:
    """A path outside the project is named by its last part: results say nothing of the machine's folders."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HERE, capture_output=True, text=True).stdout.strip()
