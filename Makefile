# One target a command; each creates the virtual environment first. `make help` lists them.
PYTHON ?= $(shell for python in python3 python3.11 python3.12 python3.13; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && exit; done; echo python3)
VENV := .venv
BIN := $(VENV)/bin
PYTEST_PARALLEL := -n 3 --dist loadfile --no-loadscope-reorder  # tests mostly wait, so there are more workers than cores

.PHONY: help setup demo up test test-slow test-long test-topologies test-browser check chaos docs bench lock image-test clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^\([a-z-]*\):[^#]*## /\1\t/p' Makefile | expand -t 8

setup: $(VENV)/.ready  ## create the virtual environment from locked requirements

$(VENV)/.ready: requirements-dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "payready needs Python 3.11 or later; try: make PYTHON=/path/to/python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements-dev.txt
	$(BIN)/pip install --quiet --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## run and check 31 jobs in 17 scenarios through the real processes, in under a minute
	$(BIN)/payready demo

up: setup  ## run the same processes until Ctrl-C
	$(BIN)/payready up

test: setup  ## the test suite without slow and long tests, on a Valkey and a PostgreSQL that it starts itself
	$(BIN)/python -m pytest -m "not slow and not long and not topology and not browser" $(PYTEST_PARALLEL)

test-slow: setup  ## slow tests that rarely fail: chaos, outages, load, a fault at each I/O operation
	$(BIN)/python -m pytest -m "slow and not long and not topology and not browser" $(PYTEST_PARALLEL)

test-long: setup  ## the longest tests, before a release: storms, fuzzers, long outages; CI does not run them
	$(BIN)/python -m pytest -m long $(PYTEST_PARALLEL)

test-topologies: setup  ## poolers, standbys, Sentinel, Cluster, proxies: real servers; CI does not run them
	$(BIN)/python -m pytest -m topology

test-browser: setup  ## the dashboard in a real Chromium; CI does not run it
	$(BIN)/python -m pytest -m browser

check: setup  ## check style, types, import contracts, and that migrations match the tables
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m tests.migrations_in_step

chaos: setup  ## inject random faults and check the invariants: make chaos SEED=1 PAYMENTS=10000 FAULTS=220
	$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) --payments $(or $(PAYMENTS),1000) --faults $(or $(FAULTS),40)

docs: setup  ## regenerate documents that are made from code: reference pages, .env.example, diagrams, JSON Schemas
	$(BIN)/python -m cli.generated_docs
	$(BIN)/python -m tests.contracts

bench: setup  ## run the benchmarks
	$(BIN)/python -m benchmarks

lock: setup  ## regenerate the locked requirements from pyproject.toml
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements.txt pyproject.toml
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header --extra otel \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements-otel.txt pyproject.toml
	$(BIN)/pip-compile --quiet --generate-hashes --strip-extras --allow-unsafe --no-header --extra dev --extra embedded \
		--no-emit-index-url --no-emit-trusted-host --no-emit-find-links --output-file requirements-dev.txt pyproject.toml

image-test: setup  ## run each role's command as in the image: locked requirements, another user, read-only files
	$(BIN)/python -m tests.deployment.image

clean:  ## remove all generated files
	rm -rf $(VENV) .run build *.egg-info .mypy_cache .ruff_cache .import_linter_cache .hypothesis
