# make demo   set up .venv and run the main job on the embedded model
# make test   set up .venv and run the default tests
# make slow   the tests that take long: campaigns of kills, errors and damage at their full counts, every family, llama.cpp
# make ray    the tests of the Ray engine, on clusters that they start and kill
# make check  lint, format, types, and imports that only go down
# make coverage  how much of the source the default tests run: benchmarks/results/coverage.json
# make bench  all benchmarks, and docs/results.md from them
# make docs   the documentation as a site, in site/
# make wheel  build sdist and wheel, and run the demo from the wheel in an empty environment

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test slow ray check coverage bench docs wheel clean

demo: .venv/.ppf
	$(BIN)/ppf demo

test: .venv/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

slow: .venv/.test
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[fuzz,llamacpp]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or llamacpp" -n 2

ray: .venv/.test
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[ray]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ray

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_package.py -k "go_down or cycle"

coverage: .venv/.dev
	$(BIN)/python benchmarks/covered.py

bench: .venv/.bench
	rm -rf runs/bench
	$(BIN)/python benchmarks/demo.py --out runs/bench
	$(BIN)/ppf bench runs/bench --out benchmarks/results/bench-ref-a.json
	$(BIN)/python benchmarks/agents.py --study runs/bench
	$(BIN)/python benchmarks/decision_speed.py
	$(BIN)/python benchmarks/live.py --study runs/bench
	$(BIN)/python benchmarks/tables.py

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel:
	PYTHON=$(PYTHON) tools/check_wheel.sh

clean:
	rm -rf .venv

# torch comes first and pinned, so that nothing that depends on it chooses another build.
.venv/.ppf: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed; $$($(PYTHON) --version) came; run make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/.test: .venv/.ppf
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

.venv/.bench: .venv/.test
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[rl,bench]'
	touch $@

.venv/.dev: .venv/.test
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

.venv/.docs: .venv/.ppf
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@
