# The environment, the main job and the checks; `make help` lists them.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?= qconfig=per_channel calib.batches=32 -m
PORT ?= 5000
BENCH ?=
WORKERS ?= 2
PARALLEL = --numprocesses $(WORKERS) --dist loadfile
COVERAGE ?=

.DEFAULT_GOAL := help
.PHONY: help setup run ui test test-fast test-slow test-all lint bench clean clean-cache

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## make the virtual environment, with pinned packages

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "qexp needs Python 3.11 to 3.13, and $(PYTHON) is $$($(PYTHON) -V 2>&1); name another with: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV) (once) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev,pt2e,runtimes,zoo,optuna,joblib,postgresql,ray,submitit]"
	@touch $@

run: $(STAMP) ## run the main job, or another with ARGS="..."
	@$(BIN)/python -m qexp $(ARGS)

ui: $(STAMP) ## open the MLflow UI on what is in outputs/, at PORT=5000
	@echo "Runs at http://127.0.0.1:$(PORT)  (Ctrl-C ends it)"
	@$(BIN)/mlflow ui --backend-store-uri sqlite:///$(CURDIR)/outputs/mlflow.db --host 127.0.0.1 --port $(PORT) --workers 1

test-fast: $(STAMP) ## run the quick ones of them, in about a minute: for while one writes code
	@$(BIN)/python -m pytest -q -m "not slow and not long" $(PARALLEL)

test: $(STAMP) ## run the tests that are not marked slow, in WORKERS=2 processes
	@$(BIN)/python -m pytest -q -m "not slow" $(PARALLEL) $(COVERAGE)

test-slow: $(STAMP) ## run the tests that are marked slow, in WORKERS=2 processes
	@$(BIN)/python -m pytest -q -m slow -rs $(PARALLEL)

test-all: test test-slow ## run all tests

lint: $(STAMP) ## check style and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(STAMP) ## measure what the project promises, as ratios; some of it with BENCH="..."
	@$(BIN)/python -m benchmarks $(BENCH)

clean-cache: ## empty outputs/cache: decoded images, predictions, timings; they are made again where needed
	rm -rf outputs/cache

clean: ## remove the environment and caches; runs and trained models under outputs/ stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .coverage outputs/cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
