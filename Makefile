# Two commands for everyone: `make demo` and `make test`. Both create .venv and install into it on the first call.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# `make gpu` and `make tune` install nothing: this Python has torch, triton, transformers and pytest already. It is that
# of .venv where there is one.
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),python3)
GPU_NEEDS := torch triton transformers pytest xdist hypothesis tqdm psutil matplotlib pandas typer
# Where `make wheelhouse` puts the peers' wheels, and where `make gpu` unpacks them.
WHEELS := wheelhouse
PEERS := build/peers
# Arguments for the demonstration, for example: make demo ARGS="--max-steps 20 --data pairs.jsonl"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install demo test quick lint types bench ecosystem matrix compile kernels gpu tune wheelhouse clean

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

# All but what is marked slow and what runs in Triton's interpreter, which has "triton" in its name.
quick: install  ## the tests of an inner loop, under ninety seconds on two idle cores
	$(PY) -m pytest -n 2 -m "not slow" -k "not triton" $(ARGS)

lint: install  ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: install  ## mypy, strict
	$(PY) -m mypy

bench: install  ## record this machine's figures under benchmarks/results/ and put them into the documents
	$(PY) -m benchmarks record $(ARGS)
	$(PY) -m benchmarks render

# Environments of their own under build/ecosystem, about 1.2 GB each; ARGS names stacks of tests/ecosystem/stacks.py.
ecosystem: install  ## train real stacks (TRL versions, LLaMA-Factory, ms-swift, ...) stock and fused, and record how they agree
	$(PY) -m tests.ecosystem $(ARGS)

# Nine environments, 17 GB; the one with torch 2.9 brings CUDA along.
matrix: install  ## the same for each version of TRL that is tested, from 0.12 to the newest
	$(PY) -m tests.ecosystem matrix $(ARGS)

compile: install  ## compile every kernel for chips that need not be there
	$(PY) -m benchmarks compile $(ARGS)

kernels: install  ## write the package as a kernel repository for Hugging Face's `kernels`, into build/hub-kernel
	$(PY) -m tools.hub_kernel $(ARGS)

# Says which modules GPU_PYTHON lacks, where a traceback would be about the first of them alone.
define needs
@PYTHONPATH=$(PEERS) $(GPU_PYTHON) -c 'import importlib.util as u, sys; lost = [m for m in sys.argv[1:] if not u.find_spec(m)]; sys.exit(bool(lost) and "$(GPU_PYTHON) lacks " + ", ".join(lost) + ": install them into it, name another (make GPU_PYTHON=...), or make install")' $(1)
endef

gpu: $(if $(wildcard $(WHEELS)/*.whl),$(PEERS)/.unpacked)  ## on a GPU, offline: a proof, the suite, the race, its targets, a page
	$(call needs,$(GPU_NEEDS))
	PYTHONPATH=. ORPO_PEERS=$(PEERS) $(GPU_PYTHON) -m benchmarks gpu $(ARGS)

tune: $(if $(wildcard $(WHEELS)/*.whl),$(PEERS)/.unpacked)  ## on a GPU, offline: time every candidate tile of the exp GEMM
	$(call needs,$(GPU_NEEDS))
	PYTHONPATH=. ORPO_PEERS=$(PEERS) $(GPU_PYTHON) -m benchmarks tune $(ARGS)

# Only what an image with torch and transformers lacks, without what those bring; last on the path, so that nothing of the
# image is replaced.
PEER_PACKAGES := liger-kernel trl datasets accelerate peft cut-cross-entropy pyarrow dill multiprocess
# The commands and their tables, and what those two bring.
PEER_PACKAGES += typer annotated-doc shellingham rich markdown-it-py mdurl pygments pydantic pydantic-core \
  annotated-types typing-inspection pandas python-dateutil tzdata

wheelhouse:  ## fetch the peers' wheels for a GPU machine without a network (Python 3.12, Linux x86-64, 73 MB)
	$(PYTHON) -m pip download --quiet --dest $(WHEELS) --no-deps --only-binary :all: --python-version 3.12 \
	  --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux2014_x86_64 \
	  --constraint constraints.txt $(PEER_PACKAGES)
	@du -sh $(WHEELS)

$(PEERS)/.unpacked: $(wildcard $(WHEELS)/*.whl)
	$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps --upgrade --target $(PEERS) $^
	@touch $@

clean:  ## remove what the commands above made
	rm -rf $(VENV) $(WHEELS) build *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache
