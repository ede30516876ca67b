#!/bin/sh
# Builds the sdist and the wheel, installs the wheel in an empty environment, and runs the demo from it alone.
#
#     make wheel                  or: tools/check_wheel.sh [SAMPLES]
#
# The fewer samples, the faster and the worse; 60 is enough to see that everything is there.
set -eu
cd "$(dirname "$0")/.."
samples=${1:-60}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
${PYTHON:-python3} -m venv "$place/build"
"$place/build/bin/pip" install --quiet --constraint constraints.txt hatchling
"$place/build/bin/hatchling" build -d "$place/dist"

${PYTHON:-python3} -m venv "$place/empty"
bin=$place/empty/bin
"$bin/pip" install --quiet --constraint constraints.txt torch
"$bin/pip" install --quiet --constraint constraints.txt "$place"/dist/*.whl

cd "$place" # where no source lies
"$bin/python" - <<'CHECK'
from pathlib import Path

import ppf

package = Path(ppf.__file__).parent
assert "site-packages" in package.parts, package
needed = [
    "py.typed",
    "models/ref-a/config.json",
    "models/ref-a/model.safetensors",
    "models/ref-a/tokenizer.json",
    "llm/pruned_model.py",
    "server/static/index.html",
    "report/report.css",
    "report/report.js",
    *(f"../ppf-{ppf.__version__}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")),
]
missing = [name for name in needed if not (package / name).is_file()]
assert not missing, missing
CHECK
"$bin/ppf" demo --samples "$samples" --out demo

tar -tzf dist/ppf-*.tar.gz >names
for name in src/ppf/py.typed tests/test_cli.py examples/fit_and_prune.py docs/index.md mkdocs.yml CHANGELOG.md CITATION.cff NOTICE; do
    grep -q "/$name\$" names || { echo "error: the sdist must hold $name; it does not; see pyproject.toml" >&2; exit 1; }
done
"$bin/pip" install --quiet --no-deps --force-reinstall dist/ppf-*.tar.gz
"$bin/ppf" --version
echo "the wheel and the sdist are whole"
