# mocbench: `make sweep` measures, `make test` runs the tests; `make help` lists all targets.
#
#   SWEEP=sweeps/x.yaml   another sweep            DATA=files:/my/corpus/*.jsonl   another text corpus
#   ARGS="--retry failed" more options for the verb
#   BASE=HEAD~1           the base of `make bench-compare`: a git revision or another checkout
#   PYTHON=python3        use an existing interpreter; nothing is created or installed

VENV := .venv
ifdef PYTHON
  PY := $(PYTHON)
  READY :=
else
  PY := $(VENV)/bin/python
  READY := $(VENV)/.ready
endif
BASE_PYTHON ?= $(shell command -v python3.11 >/dev/null 2>&1 && python3.11 -c '' >/dev/null 2>&1 && echo python3.11 || echo python3)

SWEEP ?=
DATA ?=
ARGS ?=
BASE ?= HEAD
MOCBENCH := $(PY) -m harness
# Options of pytest: $(1) processes at most, tests distributed by $(2). Empty if xdist is not installed.
# Without pytest-benchmark, which warns that it does nothing under xdist; only `make bench` needs it.
workers = $(if $(shell $(PY) -c "import xdist" 2>/dev/null && echo yes),-n auto --maxprocesses $(1) --dist $(2) -p no:benchmark)
RUN_OPTIONS := $(SWEEP) $(if $(DATA),--data '$(DATA)') $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup sweep plan status report dashboard soak test test-gpu lint format clean
.PHONY: bench bench-check bench-update bench-compare

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install the tested versions (other targets do this when needed)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mocbench needs Python 3.11 or newer; $(BASE_PYTHON) is $$($(BASE_PYTHON) -V 2>&1). Name one: make BASE_PYTHON=python3.12 ..."; exit 2; }
	@test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hf,liger]'
	@touch $@

sweep: $(READY) ## measure: sweeps/quick.yaml without a GPU, sweeps/h100_first.yaml with one, or SWEEP=...
	$(MOCBENCH) run $(RUN_OPTIONS)

plan: $(READY) ## print what `make sweep` would measure, without running it
	$(MOCBENCH) plan $(RUN_OPTIONS)

status: $(READY) ## list what is measured, what is missing and what failed
	$(MOCBENCH) status $(SWEEP) $(ARGS)

report: $(READY) ## rebuild the tables, plots and report of SWEEP from its rows
	$(MOCBENCH) report $(SWEEP)

dashboard: $(READY) ## serve the Optuna dashboard of SWEEP on loopback; ARGS='--storage URL' for a database
	$(MOCBENCH) dashboard $(SWEEP) $(ARGS)

soak: $(READY) ## kill random processes of a sweep (kill -9) and count lost rows: ARGS="--over postgres --workers 8"
	$(PY) -m harness.soak $(ARGS)

test: $(READY) ## run the tests
	$(PY) -m pytest $(call workers,4,loadfile --no-loadscope-reorder) $(ARGS)

test-gpu: $(READY) ## run only the tests that need a GPU: kernels in parallel, then measurements one at a time
	$(PY) -m pytest -m gpu $(call workers,12,worksteal) tests/kernels tests/moc $(ARGS)
	$(PY) -m pytest -m gpu --ignore=tests/kernels --ignore=tests/moc $(ARGS)

bench-check: $(READY) ## check the exact facts (no GPU needed) against budget.json; exit code 3 if one differs
	$(PY) -m harness.regression.budget $(ARGS)

bench-update: $(READY) ## write the current facts to budget.json; its diff shows what changed
	$(PY) -m harness.regression.budget --update $(ARGS)

bench: $(READY) ## time the benchmarks and keep the run in .benchmarks; `mocbench history` plots the runs
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/benchmarks/bench_all.py -p no:xdist --benchmark-only \
	  --benchmark-autosave --benchmark-save-data --benchmark-columns=median,iqr,min,rounds \
	  --benchmark-sort=name $(ARGS)

bench-compare: $(READY) ## check whether the working tree is slower than BASE=HEAD; exit code 3 if so
	$(MOCBENCH) compare $(BASE) . $(ARGS)

lint: $(READY) ## check style and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(READY) ## format the code and fix lint errors
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## remove the environment and caches; results stay
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
