# Every target does its own set-up in .venv and writes inside this folder only.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OLDEST := .venv-oldest

# Models and other caches stay inside the clone too.
export PREFOLD_CACHE ?= $(CURDIR)/.cache/prefold
export HF_HOME ?= $(CURDIR)/.cache/huggingface

.PHONY: install demo test test-slow test-gpu test-oldest lint types clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "prefold needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	@echo "setting up $(VENV), minutes the first time"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/prefold run demo

test: install lint types
	$(BIN)/pytest -n auto --maxprocesses 4 --dist worksteal --durations 10 -m 'not slow and not gpu'

test-slow: install
	$(BIN)/pytest -m 'slow and not gpu'

test-gpu: install
	$(BIN)/pytest -m gpu

# The lowest torch and transformers that pyproject.toml allows, all else as it is pinned; gigabytes, minutes.
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/pytest -n auto --maxprocesses 4 --dist worksteal -m 'not slow and not gpu'

$(OLDEST)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(OLDEST)
	@grep -vE '^(torch|transformers)==' constraints.txt > $(OLDEST)/constraints.txt
	@sed -nE 's/^ +"(torch|transformers)>=([0-9.]+),.*/\1==\2/p' pyproject.toml >> $(OLDEST)/constraints.txt
	@$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -c $(OLDEST)/constraints.txt -e '.[dev]'
	@touch $@

lint: install
	$(BIN)/ruff check src tests benchmarks notebooks docs
	$(BIN)/ruff format --check src tests benchmarks notebooks docs

types: install
	$(BIN)/mypy

clean:
	rm -rf $(VENV) $(OLDEST) .cache runs
