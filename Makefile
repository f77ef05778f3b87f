# `make demo` and `make test` work on a fresh machine with Python 3.11 or 3.12; everything lands in .venv/.
PYTHON ?= $(shell for python in python3 python3.12 python3.11; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-cluster test-kernels check format docs bench bench-all gpu-check gpu-bench gpu-claim torture clean
.DEFAULT_GOAL := demo

$(READY): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 was found: install one, or give make PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,docs]'
	touch $@

demo: $(READY)
	$(BIN)/python -m launch experiment=demo overwrite=true

test: $(READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# As root this installs what the tests need. For other users, tests that lack something are skipped with a reason.
test-cluster: $(READY)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive \
		apt-get install -qq --yes --no-install-recommends slurm-wlm munge iproute2 chromium >/dev/null; fi
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,docs,slurm,search,eval]'
	$(BIN)/python -m pytest -q -m cluster

# The GPU kernels on a CPU, in Triton's interpreter. torch for GPUs includes Triton; torch for CPUs does not.
test-kernels: $(READY)
	@$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet triton==3.6.0
	$(BIN)/python -m pytest -q -n 2 tests/test_kernels.py tests/test_mask_kernels.py tests/test_sparse_linear.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Writes the site to site/; a broken link is an error.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(READY)
	$(BIN)/python -m tests.benchmarks

# The sizes of the real models, many ranks, the memory model.
bench-all: $(READY)
	$(BIN)/python -m tests.benchmarks --all

# For a machine with one GPU, at most 5 minutes each. `make gpu-check ARGS=--rehearse` works on any machine.
gpu-check: $(READY)
	$(BIN)/python -m tests.gpu check $(ARGS)

gpu-bench: $(READY)
	$(BIN)/python -m tests.gpu bench $(ARGS)

gpu-claim: $(READY)
	$(BIN)/python -m tests.gpu claim $(ARGS)

torture: $(READY)
	$(BIN)/python -m tests.torture

clean:
	rm -rf $(VENV) *.egg-info
