# Each target sets up .venv by itself; a second run finds the stamp and starts at once.
#
#   make demo    a real transformer with packed sentences, then long context, on this machine's CPU
#   make test    the tests
#   make bench   ours, the peers, dense and the floor, side by side
#   make check   format, lint, types, import contracts
#
# Needs make, a C toolchain and Python 3.10 or later (another one: make demo PYTHON=/path/to/python3).

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench check check-format check-lint check-types check-imports format clean

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# the first of these that runs and is new enough
SUPPORTED := import sys, venv; sys.exit(not (3, 10) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python3.14 python; do \
	$$p -c '$(SUPPORTED)' >/dev/null 2>&1 && { echo $$p; break; }; done)

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.with-demo
	@$(BIN)/python examples/demo.py

test: $(VENV)/.with-dev
	@$(BIN)/python -m pytest -n auto $(ARGS)

bench: $(VENV)/.with-demo
	@$(BIN)/python -m spgen bench $(ARGS)

# one target each, so that `make --keep-going check` shows all that is wrong
check: check-format check-lint check-types check-imports

check-format: $(VENV)/.with-dev
	$(BIN)/ruff format --check .

check-lint: $(VENV)/.with-dev
	$(BIN)/ruff check .

check-types: $(VENV)/.with-dev
	$(BIN)/mypy

check-imports: $(VENV)/.with-dev
	$(BIN)/lint-imports

format: $(VENV)/.with-dev
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "spgen needs Python 3.10 to 3.14 with its venv module;" \
		"if you have one, name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "python's venv module does not work here;" \
		"on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# torch first: its build decides which triton is wanted (see constraints.txt)
$(VENV)/.with-torch: constraints.txt | $(BIN)/python
	@echo "setting up $(VENV); the first time downloads torch and tvm, about a gigabyte, or more with CUDA"
	$(PIP) --quiet torch
	@test "$$(uname -s)" != Linux || $(BIN)/python -c 'import triton' 2>/dev/null || $(PIP) --quiet triton==3.6.0
	@touch $@

$(VENV)/.with-demo: pyproject.toml $(VENV)/.with-torch
	$(PIP) --quiet --editable '.[cpu,demo]'
	@touch $@

$(VENV)/.with-dev: $(VENV)/.with-demo
	$(PIP) --quiet --editable '.[cpu,demo,dev]'
	@touch $@
