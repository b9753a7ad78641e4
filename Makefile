# Every target does its own set-up: a machine needs only Python 3.11+ and make.
# PYTHON chooses the interpreter, VENV the folder of the virtual environment. PYTEST_FLAGS are those of the tests: the
# files are shared out to two processes, in their order, so that the long ones do not come last; -n 0 runs all in one.
PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
CODE := src tests benchmarks examples $(wildcard *.py)

.DEFAULT_GOAL := help
.PHONY: help setup demo test bench lint format types clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) ## Create the virtual environment and install the pinned packages

demo: $(INSTALLED) ## Credit twelve data vendors of a small diffusion model (minutes on a laptop)
	$(BIN)/tribute run examples/digits.yaml

test: $(INSTALLED) ## Run the tests
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

bench: $(INSTALLED) ## Compare the estimators on games with known credit (a quarter of an hour)
	$(BIN)/python -m benchmarks.estimators --n 10 20 --noise 0.1 --n_seeds 3 --n_jobs 2
	$(BIN)/python -m benchmarks.coverage --n 10 20 --n_seeds 3 --n_jobs 2

lint: $(INSTALLED) ## Check style and formatting
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: $(INSTALLED) ## Mend style and formatting
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

types: $(INSTALLED) ## Check types
	$(BIN)/pyright --pythonpath $(BIN)/python

clean: ## Remove the virtual environment and all caches; runs and results stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: pinned, it is the same build whatever the other packages ask for.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Tribute needs Python 3.11 or newer; found " + sys.version.split()[0] + ". Choose another with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
