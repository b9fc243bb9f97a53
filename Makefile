# mocbench: `make sweep` measures, `make test` tests; `make help` lists the rest.
#
#   SWEEP=sweeps/x.yaml   another sweep            DATA=files:/my/corpus/*.jsonl   another text corpus
#   ARGS="--retry failed" more options for the verb
#   BASE=HEAD~1           what `make bench-compare` compares with: a git revision or another checkout
#   PYTHON=python3        use this interpreter as it stands; nothing is created or installed

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
# Options of pytest for so many processes at most, that share the tests out so; none where xdist is missing.
# Without pytest-benchmark, which warns that it does nothing beside xdist; only `make bench` needs it.
workers = $(if $(shell $(PY) -c "import xdist" 2>/dev/null && echo yes),-n auto --maxprocesses $(1) --dist $(2) -p no:benchmark)
RUN_OPTIONS := $(SWEEP) $(if $(DATA),--data '$(DATA)') $(ARGS)

.DEFAULT_GOAL := help
.PHONY: help setup sweep plan status report dashboard soak test test-gpu lint format clean
.PHONY: bench bench-check bench-update bench-compare

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv and install the tested versions (done by the other targets when needed)

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "mocbench needs Python 3.11 or newer; $(BASE_PYTHON) is $$($(BASE_PYTHON) -V 2>&1). Name one: make BASE_PYTHON=python3.12 ..."; exit 2; }
	@test -x $(VENV)/bin/python || $(BASE_PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,hf,liger]'
	@touch $@

sweep: $(READY) ## measure: sweeps/quick.yaml without a GPU, sweeps/h100_first.yaml with one, or SWEEP=...
	$(MOCBENCH) run $(RUN_OPTIONS)

plan: $(READY) ## print what `make sweep` would run; nothing runs
	$(MOCBENCH) plan $(RUN_OPTIONS)

status: $(READY) ## what is measured, what is missing, what failed
	$(MOCBENCH) status $(SWEEP)

report: $(READY) ## write the tables, plots and report of SWEEP again from its rows
	$(MOCBENCH) report $(SWEEP)

dashboard: $(READY) ## serve the Optuna dashboard of SWEEP on loopback; ARGS='--storage URL' for a database
	$(MOCBENCH) dashboard $(SWEEP) $(ARGS)

soak: $(READY) ## kill -9 at random through a sweep and count what is lost: ARGS="--over postgres --workers 8"
	$(PY) -m harness.soak $(ARGS)

test: $(READY) ## run the tests
	$(PY) -m pytest $(call workers,4,loadfile --no-loadscope-reorder) $(ARGS)

test-gpu: $(READY) ## run only the tests that need a GPU: kernels side by side, then those that measure one by one
	$(PY) -m pytest -m gpu $(call workers,12,worksteal) tests/kernels tests/moc $(ARGS)
	$(PY) -m pytest -m gpu --ignore=tests/kernels --ignore=tests/moc $(ARGS)

bench-check: $(READY) ## is everything that can be known without a GPU as budget.json says? exit code 3 if not
	$(PY) -m harness.budget $(ARGS)

bench-update: $(READY) ## accept what is: write budget.json; its diff says what changed
	$(PY) -m harness.budget --update $(ARGS)

bench: $(READY) ## time the benchmarks and keep them in .benchmarks; `mocbench history` draws them
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/benchmarks/bench_all.py -p no:xdist --benchmark-only \
	  --benchmark-autosave --benchmark-save-data --benchmark-columns=median,iqr,min,rounds \
	  --benchmark-sort=name $(ARGS)

bench-compare: $(READY) ## did the working tree become slower than BASE=HEAD? exit code 3 if so
	$(MOCBENCH) compare $(BASE) . $(ARGS)

lint: $(READY) ## check style and types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(READY) ## put the code into the project's format
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

clean: ## remove the environment and caches; results stay
	rm -rf $(VENV) .pytest_cache .hypothesis .mypy_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
