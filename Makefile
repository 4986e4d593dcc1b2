# Targets make their own virtual environment; nothing but Python 3.11+ and make has to be there.
#   PYTHON  the interpreter the environment is made with (default: python3)
#   VENV    where the environment lives                  (default: .venv)
#   ARGS    handed on to the command of quickstart, gpu-check and of every target that tests
#   TORCH   for dist, the torch to test the wheel with, e.g. torch==2.13.0 (default: the newest that is allowed)
#   JOBS    how many processes run the tests             (default: 2; 0 runs them in one, as pdb needs it)

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
DIST_VENV := .venv-dist
TORCH ?=
ARGS ?=
JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGE_STAMP := $(VENV)/.installed-package
UNFINISHED := $(VENV)/.installing
VLLM_STAMP := $(VLLM_VENV)/.installed
# Whole files go to one process, as their tests share models and launches; tests/conftest.py says which begin first.
PYTEST := $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
# vLLM needs an older transformers, the oldest that the package supports, so some other tests run there as well.
VLLM_TESTS := $(addprefix tests/,test_trl_contract.py test_trainer.py checks/test_generation_options.py \
                          examples/test_evaluate_vllm.py growth/test_backend_transformers.py growth/test_backend_vllm.py \
                          growth/test_vllm_tools.py processes/test_vllm_server.py training/test_reduces_to_grpo.py)

SUPPORTED := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-all gpu-check test-vllm lint docs dist clean

help:  ## Show this list
	@echo 'usage: make TARGET [ARGS="..."] [JOBS=2] [PYTHON=python3] [VENV=.venv]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' Makefile | expand -t 14

install: $(STAMP)  ## Make the virtual environment and install the package with its tools, in the tested versions

quickstart: $(PACKAGE_STAMP)  ## Run the quickstart on one CPU process, e.g. make quickstart ARGS="--seed 1"
	$(BIN)/accelerate launch --config_file accelerate_configs/single_cpu.yaml examples/quickstart.py $(ARGS)

test: $(STAMP)  ## Run the quick tests, in five minutes, e.g. make test ARGS="-k tree"
	$(PYTEST) -m "not (slow or browser)" $(ARGS)

test-all: $(STAMP)  ## Run all tests: also those that launch processes, train longer, or need a browser
	$(PYTEST) $(ARGS)

gpu-check: $(STAMP)  ## Check exactness, speed and memory on one GPU; writes gpu-check.json
	$(BIN)/python examples/gpu_check.py $(ARGS)

test-vllm: $(VLLM_STAMP)  ## Run the tests of vLLM, on the CPU, in an environment of its own
	$(VLLM_VENV)/bin/python -m pytest $(VLLM_TESTS) $(ARGS)

lint: $(STAMP)  ## Check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(STAMP)  ## Build the documentation into site/; a warning is an error
	$(BIN)/mkdocs build --strict

dist: $(STAMP)  ## Build wheel and sdist, check them, and run the quickstart from the wheel in a new environment
	rm -rf dist $(DIST_VENV)
	$(BIN)/python -m build
	$(BIN)/python -m twine check --strict dist/*
	$(PYTHON) -m venv $(DIST_VENV)
	$(DIST_VENV)/bin/python -m pip install dist/*.whl $(TORCH)
	cd examples && ../$(DIST_VENV)/bin/accelerate launch --config_file ../accelerate_configs/single_cpu.yaml \
	    quickstart.py --output_dir ../$(DIST_VENV)/quickstart-output
	rm -rf $(DIST_VENV)

clean:  ## Remove the virtual environments, caches and build outputs
	rm -rf $(VENV) $(VLLM_VENV) $(DIST_VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./.git -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# First the package alone, which is half of the whole and all that the quickstart needs, then what tests and tools need.
# An environment without pip, or one whose installation was cut short, is made anew; any other is kept and updated.
$(PACKAGE_STAMP): pyproject.toml constraints.txt
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	    command -v $(PYTHON) >/dev/null || \
	        { echo "error: no '$(PYTHON)' found; name a Python 3.11 or newer: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }; \
	    $(PYTHON) -c '$(SUPPORTED)' || \
	        { echo "error: Python 3.11 or newer is needed, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1);" \
	               "name a newer one: make $(MAKECMDGOALS) PYTHON=python3.11" >&2; exit 1; }; \
	    echo "$(PYTHON) -m venv --clear $(VENV)"; \
	    $(PYTHON) -m venv --clear $(VENV); \
	elif ! $(BIN)/python -c '$(SUPPORTED)'; then \
	    echo "error: $(VENV) holds $$($(BIN)/python --version 2>&1), but Python 3.11 or newer is needed; run make clean first" >&2; \
	    exit 1; \
	fi
	@touch $(UNFINISHED)
	$(BIN)/python -m pip install -c constraints.txt -e . || { rm -f $(UNFINISHED); exit 1; }
	@rm -f $(UNFINISHED)
	@touch $@

$(STAMP): $(PACKAGE_STAMP)
	@touch $(UNFINISHED)
	@rm $(PACKAGE_STAMP)
	$(BIN)/python -m pip install -c constraints.txt -e ".[dev]" || { rm -f $(UNFINISHED); exit 1; }
	@rm -f $(UNFINISHED)
	@touch $(PACKAGE_STAMP) $@

$(VLLM_STAMP): pyproject.toml tests/tools/vllm_constraints.txt tests/tools/make_vllm_env.sh
	tests/tools/make_vllm_env.sh $(PYTHON) $(VLLM_VENV)
	@touch $@
