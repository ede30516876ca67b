"""What the pages of results share: reading a results file, headings, Markdown tables."""

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

HERE = Path(__file__).parent


def load(name: str) -> dict[str, Any]:
    """A results file; empty where there is none."""
    path = HERE / "results" / f"{name}.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def table(header: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def heading(title: str, name: str, record: dict[str, Any]) -> str:
    machine = record["machine"]
    where = f"{machine['cores']} cores of {machine['cpu']}, load {machine['load']}, torch {machine['torch']}"
    seed, commit = record.get("seed", record["result"].get("seeds")), record["commit"][:8]
    commit += " with changes" if record["commit"].endswith("-dirty") else ""
    place = f"`benchmarks/results/{name}.json`: `{record['command']}`, seed {seed}, commit {commit}; {where}."
    return f"## {title}\n\n{place}\n"


def section(title: str, name: str, record: dict[str, Any], words: str, *parts: str) -> str:
    """A heading, what the figures mean, and tables or plots, a blank line between them."""
    return "\n".join([heading(title, name, record), fill(" ".join(words.split()), 120), *(f"\n{part}" for part in parts)])


def label(text: str) -> str:
    """A corpus by its name, a file by its folder and its own name."""
    path = Path(text)
    return f"{path.parent.name}/{path.stem}" if path.suffix else text


def spread(values: list[float], digits: int) -> str:
    """Mean of the seeds, and where they lie."""
    mean, least, most = (f"{value:,.{digits}f}" for value in (sum(values) / len(values), min(values), max(values)))
    return mean if least == most else f"{mean} ({least} to {most})"


def within(taus: dict[str, float]) -> str:
    """Kendall's tau at each ratio."""
    return " / ".join(f"{value:.2f}" for value in taus.values())
