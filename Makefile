# Every target goes through `setup`, which does its work only when the lock or the project file changed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
DEMO ?=
BENCHMARKS := plan codec islands_codec average membership memory steady recovery same_bits storage convert checkpoint_kills drill soak

.DEFAULT_GOAL := help
.PHONY: help setup demo lint types test test-long test-slurm test-gpu bench clean

help:
	@echo "make setup      create $(VENV) and install the pinned packages"
	@echo "make demo       kill workers and nodes of a small run and compare it with its twin"
	@echo "make test       style, types and the short tests"
	@echo "make test-long  the tests marked long"
	@echo "make test-slurm the tests on a real SLURM cluster, which it makes here (as root)"
	@echo "make test-gpu   the tests that need a CUDA device"
	@echo "make bench      every benchmark (about an hour)"
	@echo "make clean      remove what these targets made, $(VENV) included"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "outlast needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@# The root of the checkout is the package: mypy finds it under its name through this link.
	mkdir -p $(VENV)/typing && ln -sfn ../.. $(VENV)/typing/outlast
	@touch $@

demo: setup
	$(BIN)/outlast drill --log-dir runs/demo --nodes 4 --nproc-per-node 2 --pace 1 \
	  --fault kill-worker@step=12 --fault kill-node@step=36 --fault kill-proposer@step=60 \
	  --fault kill-worker@step=84+kill-node@phase=finish $(DEMO) \
	  examples/gpt.py --steps 120 --layers 4 --width 128 --heads 4 --context 128 \
	  --batch-size 4 --leaves 8 --zero 2 --seed 0 --corpus-mb 4 --eval-every 0

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest -m "not long and not gpu and not slurm"

test-long: setup
	$(BIN)/python -m pytest -m "long and not gpu and not slurm"

# Installs SLURM where it can. Where it cannot the tests say "not run"; with CI set they fail.
test-slurm: setup
	$(BIN)/python -m pytest -m slurm -rs tests/slurm

test-gpu: setup
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python -m pytest -m gpu -rs; \
	else \
	  echo "not run: no CUDA device"; \
	fi

bench: setup
	@set -e; for script in $(BENCHMARKS:%=benchmarks/%.py); do \
	  echo "== $$script"; $(BIN)/python $$script; \
	done

clean:
	rm -rf $(VENV) runs outlast_logs build dist *.egg-info \
	  .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
