# Both commands do all their set-up: a virtual environment, the pinned packages, this package.
VENV ?= .venv
PYTHON ?= python3.11
BIN := $(VENV)/bin
ARGS ?=
JOBS ?= 2

.PHONY: quickstart test lint install

quickstart: install
	$(BIN)/ssd quickstart $(ARGS)

test: install
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q --numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not on the path. Install Python 3.11 or newer, or name yours: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	@touch $@
