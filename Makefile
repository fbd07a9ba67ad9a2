# make help lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=
N ?=
# Processes that run tests; many tests wait more than they compute.
WORKERS ?= 3
MINUTES ?= $(if $(N),inf,30)
SEED ?= 0
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

.DEFAULT_GOAL := help
.PHONY: help setup cuda horovod train check-model evaluate watch report sweep doctor verify test test-quick slurm-test soak check format clean

help: ## List the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: $(VENV)/.installed ## Create .venv and install the package with the pinned versions

cuda: setup ## Install CUDA's libraries into .venv, for machines that have a driver only
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint pins.txt --editable '.[cuda]'

horovod: setup ## Build Horovod for the installed TensorFlow, install and try it (minutes the first time)
	scripts/horovod/build.sh $(BIN)/python

train: setup ## Train; for example: make train ARGS="trainer.epochs=5 model=cnn"
	$(BIN)/python -m mnist_dist.train $(ARGS)

check-model: setup ## Say whether your own network can be trained; for example: make check-model ARGS="model.factory=examples.own_model.residual:build"
	$(BIN)/python -m mnist_dist.check_model $(ARGS)

evaluate: setup ## Evaluate a run; for example: make evaluate ARGS="run_dir=runs/... split=val"
	$(BIN)/python -m mnist_dist.evaluate $(ARGS)

watch: setup ## Watch a run while it trains; for example: make watch ARGS="run_dir=runs/..."
	$(BIN)/python -m mnist_dist.watch $(ARGS)

report: setup ## Write the page of a run, or of several; for example: make report ARGS="run_dir=runs/..."
	$(BIN)/python -m mnist_dist.report $(ARGS)

sweep: $(VENV)/.installed-sweep ## Search for good values; for example: make sweep ARGS="space=mlp num_trials=20"
	$(BIN)/python -m mnist_dist.sweep $(ARGS)

doctor: setup ## Say what would go wrong with a training here; for example: make doctor ARGS="strategy=horovod data=mnist"
	$(BIN)/python -m mnist_dist.doctor $(ARGS)

verify: setup ## Say whether this cluster trains correctly; for example: make verify ARGS="strategy=mirrored"
	$(BIN)/python -m mnist_dist.verify $(ARGS)

test-quick: $(VENV)/.installed-dev ## Run the tests that start no program: a minute
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup tests/unit $(ARGS)

test: $(VENV)/.installed-dev ## Run all tests; for example: make test ARGS="-k history"
	@if command -v c++ >/dev/null; then $(MAKE) --no-print-directory horovod; fi
	$(BIN)/python -m pytest --numprocesses=$(WORKERS) --dist=loadgroup $(ARGS)

slurm-test: $(VENV)/.installed-dev ## Train on clusters of two and three nodes on this machine; needs Debian's slurm-wlm and munge
	@if command -v c++ >/dev/null; then $(MAKE) --no-print-directory horovod; fi
	CI=true $(BIN)/python -m pytest -m slurm $(ARGS)

soak: $(VENV)/.installed-dev ## Kill, freeze and starve runs at random moments, lose nodes, and compare; for example: make soak MINUTES=60 or N=10 SEED=7
	@if command -v c++ >/dev/null; then $(MAKE) --no-print-directory horovod; fi
	$(BIN)/python tests/support/soak.py --rounds $(or $(N),0) --minutes $(MINUTES) --seed $(SEED) $(ARGS)

check: $(VENV)/.installed-dev ## Check format, lint, types and the import rule; changes nothing
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed-dev ## Format the code and fix what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## Remove .venv and caches; runs stay
	rm -rf $(VENV) .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

# The stamps make a second call install nothing, until what is to be installed changes.
$(VENV)/.installed: pyproject.toml pins.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint pins.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint pins.txt --editable '.[dev]'
	touch $@

$(VENV)/.installed-sweep: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint pins.txt --editable '.[sweep]'
	touch $@
