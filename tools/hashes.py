"""Writes hashes.txt: the exact packages that the tests run with, and the hash of each file, as pip resolves them here.

    python tools/hashes.py    # with the network; then pip install --no-deps --require-hashes -r hashes.txt

The file is for Python 3.11 on Linux. torch is left out: its builds for CPU and for CUDA are different files of one version.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("ppf", "torch")
HEAD = "# Made by tools/hashes.py. Install torch first, as constraints.txt has it.\n"


def main() -> None:
    wanted = ["torch", "--editable", f"{ROOT}[test]"]
    options = ["--dry-run", "--ignore-installed", "--quiet", "--report", "-", "--constraint", str(ROOT / "constraints.txt")]
    made = subprocess.run([sys.executable, "-m", "pip", "install", *options, *wanted], capture_output=True, text=True, check=True)
    lines = []
    for entry in json.loads(made.stdout)["install"]:
        name, version = entry["metadata"]["name"], entry["metadata"]["version"]
        if name not in LEFT_OUT:
            lines.append(f"{name}=={version} --hash=sha256:{entry['download_info']['archive_info']['hashes']['sha256']}\n")
    (ROOT / "hashes.txt").write_text(HEAD + "".join(sorted(lines, key=str.lower)))


if __name__ == "__main__":
    main()
