"""How much of the source do the default tests run? Line by line, in the processes that they start too.

    python benchmarks/covered.py      # make coverage; the lines that nothing ran: python -m coverage report -m
    python benchmarks/covered.py --measured     # what `coverage run -m pytest ...` left, such as after one test was run again

What only a slow test runs, or one that needs an accelerator, llama.cpp, Ray or a browser, counts as not run. So does what runs
in a process that a test kills, or starts with an environment of its own.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

from record import write

ROOT = Path(__file__).parents[1]
FOUND = ROOT / "runs" / "covered.json"
SOURCE = "src/ppf/"


def coverage(*arguments: str) -> None:
    """One of coverage.py's commands; pyproject.toml says what it measures. Ends this process if it fails."""
    ended = subprocess.run([sys.executable, "-m", "coverage", *arguments], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if ended.returncode:
        sys.exit(f"coverage {arguments[0]}: exit code {ended.returncode}; nothing is written")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--measured", action="store_true", help="run no test; what was measured lies in runs/")
    FOUND.parent.mkdir(exist_ok=True)
    if not parser.parse_args().measured:
        coverage("erase")
        coverage("run", "-m", "pytest", "-n", "2", "--dist", "loadfile")
    coverage("combine", "--append", "--quiet")
    coverage("json", "--quiet", "-o", str(FOUND))
    files = {
        name.removeprefix(SOURCE): {"lines": found["summary"]["num_statements"], "run": found["summary"]["covered_lines"]}
        for name, found in json.loads(FOUND.read_text())["files"].items()
        if found["summary"]["num_statements"]
    }
    parts: dict[str, dict[str, int]] = defaultdict(lambda: {"lines": 0, "run": 0})
    for name, found in files.items():
        part = name.partition("/")[0] if "/" in name else "ppf"
        for key, count in found.items():
            parts[part][key] += count
            parts["all"][key] += count
    write("coverage", 0, {"parts": dict(sorted(parts.items())), "files": files})


if __name__ == "__main__":
    main()
