# Forebay. `make run` shows it at work, `make test` proves it; both set up what they need.

SHELL := /bin/bash
BIN := .venv/bin

SYSTEM_FOREBAY ?= $(CURDIR)/$(BIN)/forebay

.PHONY: install install-system run test lint bench soak packages venv venv-dev

install: packages venv
	@echo "forebay is at $(CURDIR)/$(BIN)/forebay"

install-system: install
	@bash tools/system/install "$(SYSTEM_FOREBAY)"

run: packages venv
	@$(BIN)/python -m forebay_tools.demo

test: packages venv-dev
	@$(BIN)/python -m pytest -m "not soak"

soak: packages venv-dev
	@PYTHONPATH=tests $(BIN)/python -m pytest -p soak_progress -m soak --timeout 0

bench: packages venv-dev
	@$(BIN)/python bench/run.py

lint: venv-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports

packages venv venv-dev:
	@bash .ci/setup $@
