# Set-up, demo and tests. `make demo` and `make test` need only Python >= 3.11; a second call starts at once.
VENV ?= .venv
PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?= -n 2 --dist worksteal
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test gpu kernels models evidence fuzz lint wheel clean

demo: $(READY)  ## verify the ops used, then train digits with torch's layers and with ours
	$(BIN)/python -m bptoolkit.recipes.demo

test: $(READY)  ## the whole test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS)  # one thread a worker: two workers, two cores

models: $(VENV)/.models  ## whole models of transformers, swapped: float64, bfloat16, what runs our backward
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_ARGS) tests/models

evidence: $(READY)  ## every planted fault and correct twin, three seeds: about an hour on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore tests/faults/evidence.py

gpu:  ## on a machine with a GPU: every kernel and op, then speed and memory; results in $OUT, or benchmarks/results
	$(PYTHON) benchmarks/gpu.py --out "$${OUT:-benchmarks/results}" --resume benchmarks/results

kernels: $(READY)  ## compile every kernel that has changed, and all of its tests in the interpreter: long
	$(BIN)/python -m bptoolkit kernels --record benchmarks/results/kernels.json --markdown docs/kernels.md
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest $(PYTEST_ARGS) tests/kernels

fuzz: $(READY)  ## the property tests, long and random
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest $(PYTEST_ARGS) tests/test_gradients.py tests/test_composition.py

lint: $(VENV)/.lint  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(READY)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "bptoolkit needs Python 3.11 or newer; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[kernels,recipes,test]"
	touch $(READY)

$(VENV)/.models: $(READY)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[models,test]"
	touch $(VENV)/.models

$(VENV)/.lint: $(READY)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --constraint constraints.txt --editable ".[dev]"
	touch $(VENV)/.lint

clean:
	rm -rf $(VENV) build dist *.egg-info
