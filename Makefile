# make demo    install what the demo needs and compress the embedded digits network to half its latency
# make test    install the development tools, then check everything and run the tests
# make check   the checks alone: style, types, layers
# make clean   remove what these made, the virtual environment included

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
# The oldest supported Python first: wheels are published for it longest. It must be able to make an environment.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
PIP := $(BIN)/python -m pip --disable-pip-version-check

.PHONY: demo test check clean
.DELETE_ON_ERROR:

# A search ends once nothing is lost inside the limit; this one goes on and uses its time.
demo: $(VENV)/.demo
	rm -rf $(DEMO) $(DEMO)-deployed
	$(BIN)/autocompress search --task digits --target-latency 0.5x --max-drop 2pp --timeout 3m --set stop_early=false \
		--out $(DEMO)
	$(BIN)/autocompress pareto $(DEMO)
	$(BIN)/autocompress deploy $(DEMO) --to $(DEMO)-deployed

test: check
	@# Two processes of one thread each: more, and what is timed would be timed beside too much.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) $(DEMO) $(DEMO)-deployed build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "autocompress needs Python 3.11 or newer with its venv module; found none." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Each stamp is as old as its installation, so that nothing is installed twice until pyproject.toml changes. The order-only
# prerequisite ignores the interpreter's own date.
$(VENV)/.demo: pyproject.toml | $(BIN)/python
	@# `dev` holds all that the demo needs.
	test $(VENV)/.dev -nt pyproject.toml || $(PIP) install --quiet --editable '.[demo]'
	touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	$(PIP) install --quiet --editable '.[dev]'
	touch $@
