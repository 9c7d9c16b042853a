# `make help` lists the targets. Everything lives in .venv; nothing needs root, a GPU, an account or a network
# beyond the package index.

PYTHON ?= python3
VENV   ?= .venv
# Another build of torch: `make setup TORCH="torch==2.13.0 --index-url ADDRESS-OF-THE-BUILD"`.
TORCH  ?= torch==2.13.0
PY     := $(VENV)/bin/python
CODE   := model blocks losses data training analysis scripts tests train.py errors.py
CONFIG ?= configs/demo.yaml
# Triton kernels: 1 = in the interpreter (no GPU needed), 0 = on the GPU.
INTERPRET ?= 1

.DEFAULT_GOAL := help
.PHONY: help setup setup-cuda train test test-oracles test-slow check bench mutants chaos chaos-slice format lock

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(VENV)/.ready ## create .venv and install the pinned dependencies

$(VENV)/.ready: requirements.lock Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python >= 3.11 is needed, this is " + sys.version.split()[0])'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --require-hashes -r requirements.lock
	$(PY) -m pip install --quiet $(TORCH)
	@touch $@

setup-cuda: $(VENV)/.ready ## on a GPU machine: build mamba-ssm and causal-conv1d against the installed torch
	$(PY) -m pip install --quiet ninja packaging setuptools wheel
	MAMBA_FORCE_BUILD=TRUE $(PY) -m pip install --no-build-isolation --no-deps mamba-ssm==2.3.2.post1
	CAUSAL_CONV1D_FORCE_BUILD=TRUE $(PY) -m pip install --no-build-isolation --no-deps causal-conv1d==1.7.0
	$(PY) -m pip install --quiet "triton>=3.5"

train: $(VENV)/.ready ## train the default run (configs/demo.yaml); again: continue it or start the next
	$(PY) train.py $(CONFIG)

test: $(VENV)/.ready ## the test suite
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n logical --maxprocesses 4

test-oracles: $(VENV)/.ready ## our blocks against transformers and against mamba-ssm's Triton kernels (interpreted on a CPU)
	$(PY) -m scripts.peers
	OMP_NUM_THREADS=1 .venvs/hf/bin/python -m pytest tests/oracle_suites/hf
	OMP_NUM_THREADS=1 TRITON_INTERPRET=$(INTERPRET) .venvs/kernels/bin/python -m pytest tests/oracle_suites/kernels

check: $(VENV)/.ready ## format, lint, types
	$(PY) -m ruff format --check $(CODE)
	$(PY) -m ruff check $(CODE)
	$(PY) -m mypy

test-slow: $(VENV)/.ready ## the tests over 20 seconds: torchrun jobs, compilation, a browser, Slurm (where installed)
	OMP_NUM_THREADS=1 $(PY) -m pytest -m slow -n logical --maxprocesses 2 --dist loadgroup

mutants: $(VENV)/.ready ## cut wiring faults into the code, one by one, and show what notices each (about 4 minutes)
	OMP_NUM_THREADS=1 $(PY) -m tests.mutants

chaos: $(VENV)/.ready ## kill, damage, fill and confuse runs: all must end as if nothing had happened; writes docs/results/chaos.md
	OMP_NUM_THREADS=1 $(PY) -m scripts.chaos --size nightly --write

chaos-slice: $(VENV)/.ready ## three minutes of it, with a fixed seed
	OMP_NUM_THREADS=1 $(PY) -m scripts.chaos --size slice

bench: $(VENV)/.ready ## speed against named peers, each ratio beside its bar and its goal (about 15 minutes)
	$(PY) -m scripts.bench

format: $(VENV)/.ready ## format the code in place
	$(PY) -m ruff check --fix --quiet $(CODE)
	$(PY) -m ruff format $(CODE)

lock: ## pin requirements.in again into requirements.lock
	$(PY) -m pip install --quiet pip-tools
	$(VENV)/bin/pip-compile --quiet --generate-hashes --strip-extras --no-emit-index-url --no-emit-find-links \
		--no-emit-trusted-host --output-file requirements.lock requirements.in
