# One command each; all of them make the virtual environment first. `make help` lists them.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo up test test-slow check chaos docs bench lock image-test clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 8

setup: $(VENV)/.ready  ## the virtual environment, from locked requirements

$(VENV)/.ready: requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "payready needs Python 3.11 or later; try: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## every scenario through the real processes, checked, in under a minute
	$(BIN)/payready demo

up: setup  ## the same processes, until Ctrl-C
	$(BIN)/payready up

test: setup  ## all tests, on a Valkey and a PostgreSQL that they start themselves
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder  # most of the time is waiting: more workers than cores

check: setup  ## style, types, import rules, and migrations in step with the tables
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.migrations_in_step

chaos: setup  ## everything broken at random, and checked: make chaos SEED=1 PAYMENTS=10000 FAULTS=220
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) --payments $(or $(PAYMENTS),1000) --faults $(or $(FAULTS),40)

docs: setup  ## renew what is made from code: configuration, .env.example, state diagrams, JSON Schemas
	$(BIN)/python -m cli.generated_docs
	$(BIN)/python -m tests.contracts

bench: setup  ## figures, side by side
	$(BIN)/python -m benchmarks

lock: setup  ## renew the locked requirements from pyproject.toml
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements.txt pyproject.toml
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header --extra otel \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements-otel.txt pyproject.toml
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header --extra dev --extra embedded \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements-dev.txt pyproject.toml

image-test: setup  ## every role's exact command, as in the image: locked requirements only, another user, nothing to write to
	$(BIN)/python -m tests.deployment.image

clean:  ## remove what make made
	rm -rf $(VENV) .run build *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis
