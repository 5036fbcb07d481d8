# Every target does its own set-up: a machine with python3 (3.11 or newer), make and git is enough.
#
#   make demo    a small service on this machine: make a checkpoint, serve it, stream answers
#   make demo-model  train the demo model anew into build/demo-model (about an hour on two cores)
#   make test    lint and all tests
#   make chaos   kills, stops and cuts under load for CHAOS_MINUTES (60)
#   make bench   decode and prefill beside transformers, into tests/bench/results
#   make venv    only the virtual environment .venv
#   make lint    ruff, mypy, import-linter, and whether the generated stubs are up to date
#   make format  let ruff correct and format the code
#   make proto   generate cluster/v1 from proto/
#   make clean   remove the virtual environments and all caches

PYTHON ?= python3
VENV := .venv
PROTO_VENV := .venv-proto
CHAOS_MINUTES ?= 60
BIN := $(VENV)/bin
# Files in the order given: the longest come first, so that both processes end at about the same time.
IN_TWO_PROCESSES := --numprocesses 2 --dist loadfile --no-loadscope-reorder

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo demo-model bench chaos test pytest venv lint format proto proto-check clean

export RAY_USAGE_STATS_ENABLED := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

help:
	@sed -n 's/^#  //p' Makefile

demo: venv
	$(BIN)/python -m cluster.demo

demo-model: venv
	$(BIN)/python scripts/train_demo/train.py --out build/demo-model

bench: venv
	$(BIN)/arriero bench engine --peers transformers --out tests/bench/results

chaos: venv
	PYTHONPATH=tests $(BIN)/python -m chaos.run --minutes $(CHAOS_MINUTES) $(CHAOS_ARGS)

test: lint pytest

# A local ray.init() of Ray >= 2.59 turns token authentication on behind one's back; tests say what they want.
pytest: export RAY_AUTH_MODE := disabled
pytest: venv
ifdef PYTEST_ARGS
	$(BIN)/pytest $(PYTEST_ARGS)
else
	$(BIN)/pytest $(IN_TWO_PROCESSES) tests/distributed tests/unit
	$(BIN)/pytest tests/e2e
endif

lint: venv proto-check
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: venv
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

venv: $(VENV)/.installed

# The stamp holds the folder that the environment was made in: one that moved, or whose interpreter is gone, does
# not work any more and is made anew.
$(foreach venv,$(VENV) $(PROTO_VENV),$(shell \
  [ "$$(cat $(venv)/.installed 2>/dev/null)" = "$(CURDIR)" ] && $(venv)/bin/python -c '' || rm -f $(venv)/.installed))

$(VENV)/.installed: pyproject.toml
	@scripts/make-venv.sh $(PYTHON) $(VENV)
	@echo 'installing into $(VENV) (about 1.5 GB, minutes) ...'
	@$(BIN)/pip install --quiet --editable '.[dev]'
	@echo '$(CURDIR)' > $@

$(PROTO_VENV)/.installed: proto/requirements.txt
	@scripts/make-venv.sh $(PYTHON) $(PROTO_VENV)
	@$(PROTO_VENV)/bin/pip install --quiet --requirement proto/requirements.txt
	@echo '$(CURDIR)' > $@

proto: $(PROTO_VENV)/.installed
	proto/generate.sh $(PROTO_VENV) .

proto-check: $(PROTO_VENV)/.installed
	@out=$$(mktemp -d); trap 'rm -rf "$$out"' EXIT; \
	proto/generate.sh $(PROTO_VENV) "$$out"; touch "$$out/cluster/v1/__init__.py"; \
	diff --recursive --exclude=__pycache__ "$$out/cluster/v1" cluster/v1 \
	  || { echo 'cluster/v1 is not what proto/ generates: run make proto' >&2; exit 1; }

clean:
	rm -rf $(VENV) $(PROTO_VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
