"""Where a figure comes from: command, commit, machine."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "numpy", "scipy")


def provenance() -> dict[str, Any]:
    """Command, version, commit (with ``-dirty`` if files differ from it; None outside a checkout) and machine."""
    import ppf

    program = Path(sys.argv[0]).resolve()
    if program.name == "__main__.py":
        name = ["python", "-m", program.parent.name]
    else:
        name = ["python", f"{program.parent.name}/{program.name}"] if program.suffix == ".py" else [program.name]
    return {
        "command": " ".join([*name, *map(portable, sys.argv[1:])]),
        "version": ppf.__version__,
        "commit": _commit(),
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """CPU, cores, threads, load and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": cores(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        **{package: version(package) for package in _PACKAGES},
    }


def own_name(name: str) -> str:
    """What may be told of a model or a text: a place's own name, nothing of the folders of this machine; a hub id stays whole."""
    is_place = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()
    return Path(name).name or name if is_place else name


def cores() -> int:
    """Cores that this process may use; all where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def portable(argument: str) -> str:
    """An argument of a command that may be passed on: an absolute path is named by its last part."""
    flag, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    return flag + equals + (Path(value).name if Path(value).is_absolute() else value)


def _commit() -> str | None:
    here = Path(__file__).parent
    if not _git(here, "ls-files", __file__):
        return None
    changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ":!/benchmarks/results", ":!/docs")
    return _git(here, "rev-parse", "HEAD") + ("-dirty" if changed else "")


def _git(folder: Path, *arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return ""
