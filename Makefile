# Two commands for everyone: `make demo` and `make test`. Both create .venv and install into it on the first call.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# Arguments for the demonstration, for example: make demo ARGS="--max-steps 20 --data pairs.jsonl"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types bench clean

help:  ## this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

# The stamp is newer than what it was installed from, so an edited dependency reinstalls and nothing else does.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "orpo_kernels needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[hf,bench,dev]"
	@touch $@

install: $(VENV)/.installed  ## create .venv and install the package with everything CI uses

demo: install  ## train a small model with ORPO: stock TRL, the patch, and plain fine-tuning, compared
	$(PY) -m examples.demo $(ARGS)

test: install  ## every test
	$(PY) -m pytest -n 2 $(ARGS)

lint: install  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: install  ## mypy, strict
	$(PY) -m mypy

bench: install  ## record this machine's figures under benchmarks/results/ and put them into the documents
	$(PY) -m benchmarks record $(ARGS)
	$(PY) -m benchmarks render

clean:  ## remove what the commands above made
	rm -rf $(VENV) build *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache
