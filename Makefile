# One command each; `make setup` is implied by all of them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo up test check bench lock clean
.DEFAULT_GOAL := demo

setup: $(VENV)/.ready

$(VENV)/.ready: requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "payready needs Python 3.11 or later; try: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## every scenario through the real processes, checked, in under a minute
	$(BIN)/payready demo

up: setup  ## the same processes, until Ctrl-C
	$(BIN)/payready up

test: setup  ## all tests, on a Valkey and a PostgreSQL that they start themselves
	$(BIN)/python -m pytest

check: setup  ## style, types, import rules, and migrations in step with the tables
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.migrations_in_step

bench: setup  ## figures, side by side
	$(BIN)/python -m benchmarks

lock: setup  ## renew the locked requirements from pyproject.toml
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements.txt pyproject.toml
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header --extra dev --extra embedded \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements-dev.txt pyproject.toml

clean:
	rm -rf $(VENV) .run build *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis
