# Every target sets itself up in .venv and writes only inside this folder.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest

# Models and other caches stay inside the clone too.
export PREFOLD_CACHE ?= $(CURDIR)/.cache/prefold
export HF_HOME ?= $(CURDIR)/.cache/huggingface

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu test-oldest lint types docs bench clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-11s %s\n", $$1, $$2}' Makefile

install: $(STAMP) ## .venv with prefold and the development tools

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prefold needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV), minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install ## the whole pipeline on a real 135M model, on a CPU, in minutes
	$(BIN)/prefold run demo

test: install lint types ## lint, types and the fast tests, with the ten slowest shown
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal --durations 10 -m 'not slow and not gpu'

test-slow: install ## the longer tests: the real model, TRL, the tutorials as written
	$(BIN)/pytest -m 'slow and not gpu'

test-gpu: install ## what needs a CUDA device
	$(BIN)/pytest -m gpu

# Everything else stays pinned. Downloads gigabytes.
test-oldest: $(OLDEST)/.installed ## the fast tests with the oldest torch and transformers that are allowed
	$(OLDEST)/bin/pytest -n auto --maxprocesses 4 --dist worksteal -m 'not slow and not gpu'

$(OLDEST)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(OLDEST)
	@grep -vE '^(torch|transformers)==' constraints.txt > $(OLDEST)/constraints.txt
	@sed -nE 's/^ +"(torch|transformers)>=([0-9.]+),.*/\1==\2/p' pyproject.toml >> $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[dev]'
	@touch $@

lint: install ## ruff: rules and format
	$(BIN)/ruff check src tests benchmarks notebooks docs
	$(BIN)/ruff format --check src tests benchmarks notebooks docs

types: install ## mypy, strict
	$(BIN)/mypy

docs: install ## regenerate the pages that are made from the code
	$(BIN)/python docs/recipe_reference.py > docs/recipe.md
	$(BIN)/python docs/algorithms/table.py > docs/algorithms/README.md
	$(BIN)/python docs/algorithms/curves.py

BASE ?= main
bench: install ## time steps of this tree and of another commit alternately: make bench BASE=COMMIT
	git worktree add --force --detach .bench $(BASE)
	$(BIN)/python -m benchmarks.vs_trl dpo --base .bench/src --pairs 20; status=$$?; \
	git worktree remove --force .bench; exit $$status

clean: ## remove .venv, caches and runs of this folder
	rm -rf $(VENV) $(OLDEST) .cache runs
