"""Writes hashes.txt: the exact packages of every extra, and the hash of each file, as pip resolves them here.

    python tools/hashes.py    # with the network; then pip install --no-deps --require-hashes -r hashes.txt

What the file has already keeps its version, unless constraints.txt says otherwise: take a line out to have it renewed.
The file is for Python 3.11 on Linux. torch is left out: its builds for CPU and for CUDA are different files of one version.
So are extras that need a package which has no wheel: pip would run its code to build one.
"""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("ppf", "torch")
AS_SOURCE = {"llamacpp": "llama-cpp-python", "eval": "lm-eval[hf]"}
"""Extras without wheels, and the package of each that needs a build."""
HEAD = "# Made by tools/hashes.py. Install torch first, as constraints.txt has it.\n"


def _kept() -> str:
    """The pins that the file has, but for those that constraints.txt names too."""
    named = {_plain(line.partition("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    pins = [line.split()[0] for line in (ROOT / "hashes.txt").read_text().splitlines() if "==" in line]
    return "\n".join(pin for pin in pins if _plain(pin.partition("==")[0]) not in named)


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def main() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = ["torch", "--editable", f"{ROOT}[{','.join(name for name in extras if name not in AS_SOURCE)}]"]
    options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", "-"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as kept:
        kept.write(_kept())
        kept.flush()
        limits = [word for file in (ROOT / "constraints.txt", kept.name) for word in ("--constraint", str(file))]
        command = [sys.executable, "-m", "pip", "install", *options, *limits, *wanted]
        made = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [f"# Without the extra {name}: {package} needs what comes as source alone.\n" for name, package in AS_SOURCE.items()]
    for entry in sorted(json.loads(made.stdout)["install"], key=lambda entry: entry["metadata"]["name"].lower()):
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        if name not in LEFT_OUT:
            lines.append(f"{name}=={version} --hash=sha256:{entry['download_info']['archive_info']['hashes']['sha256']}\n")
    (ROOT / "hashes.txt").write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
