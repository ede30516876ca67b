"""Writes hashes.txt: the exact packages of every extra, and the hash of each file, as pip resolves them here.

    python tools/hashes.py    # with the network; then pip install --no-deps --require-hashes -r hashes.txt

The file is for Python 3.11 on Linux. torch is left out: its builds for CPU and for CUDA are different files of one version.
So are extras that need a package which has no wheel: pip would run its code to build one.
"""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("ppf", "torch")
AS_SOURCE = {"llamacpp": "llama-cpp-python", "eval": "lm-eval[hf]"}
"""Extras without wheels, and the package of each that needs a build."""
HEAD = "# Made by tools/hashes.py. Install torch first, as constraints.txt has it.\n"


def main() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = ["torch", "--editable", f"{ROOT}[{','.join(name for name in extras if name not in AS_SOURCE)}]"]
    options = ["--dry-run", "--ignore-installed", "--only-binary", ":all:", "--quiet", "--report", "-"]
    command = [sys.executable, "-m", "pip", "install", *options, "--constraint", str(ROOT / "constraints.txt"), *wanted]
    made = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [
        f"# Without the extra {name}: {package} needs one that comes as source alone.\n" for name, package in AS_SOURCE.items()
    ]
    for entry in sorted(json.loads(made.stdout)["install"], key=lambda entry: entry["metadata"]["name"].lower()):
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        if name not in LEFT_OUT:
            lines.append(f"{name}=={version} --hash=sha256:{entry['download_info']['archive_info']['hashes']['sha256']}\n")
    (ROOT / "hashes.txt").write_text(HEAD + "".join(lines))


if __name__ == "__main__":
    main()
