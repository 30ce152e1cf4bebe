# Everything here needs only `python3` (3.11 to 3.13) and `make`; the rest is installed into .venv,
# pinned by requirements/.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PYTEST_WORKERS ?= 2
TAG := $(shell $(PYTHON) -c "import sys; print('py%d.%d' % sys.version_info[:2])")
CONSTRAINTS ?= requirements/constraints-$(TAG).txt
STAMP = $(VENV)/.installed-dev

.PHONY: help demo test test-slow test-tensorflow test-tensorflow-slow bench-tensorflow test-matrix bench bench-gpu docs lint types floors doctest examples reference clean

help:
	@echo "make demo | test | test-slow | test-matrix | lint | types | docs | bench | bench-gpu | clean"

$(STAMP): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[dev]"
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[test]"
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/tangents demo $(DEMO_ARGS)

$(VENV)/.installed-demo: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[demo]"
	@touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -m "not slow" -n $(PYTEST_WORKERS) tests

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow -n $(PYTEST_WORKERS) tests

# TensorFlow stands in an environment of its own: the other tests must pass without it.
TF_VENV ?= .venv-tf
TF_PYTHON ?= python3.11
TF_CONSTRAINTS ?= requirements/constraints-tensorflow-py3.11.txt
TF_STAMP = $(TF_VENV)/.installed-tensorflow

$(TF_STAMP): pyproject.toml $(TF_CONSTRAINTS)
	$(TF_PYTHON) -m venv $(TF_VENV)
	$(TF_VENV)/bin/pip install --quiet --disable-pip-version-check -c $(TF_CONSTRAINTS) \
	  -e ".[tensorflow]" pytest pytest-xdist pytest-timeout hypothesis sybil
	@touch $@

test-tensorflow: $(TF_STAMP)
	$(TF_VENV)/bin/python -m pytest -m "not slow" -n $(PYTEST_WORKERS) tests/frontends
	$(TF_VENV)/bin/python -m pytest -k "kernel/mlp or kernel/cnn or first_call/mlp/auto" tests/test_benchmarks.py
	$(TF_VENV)/bin/python -m pytest docs/tensorflow.md -p no:cacheprovider
	set -e; for f in $(wildcard examples/tensorflow_*.py); do echo "== $$f"; $(TF_VENV)/bin/python $$f; done

test-tensorflow-slow: $(TF_STAMP)
	$(TF_VENV)/bin/python -m pytest -m slow tests/frontends

bench-tensorflow: $(TF_STAMP)
	bash benchmarks/peer/setup tensorflow
	$(TF_VENV)/bin/python -m benchmarks --only tensorflow --json benchmarks/results/tensorflow.json

test-matrix:
	bash tests/matrix.sh

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: $(STAMP)
	$(BIN)/basedpyright

doctest: $(STAMP)
	$(BIN)/python -m pytest --doctest-modules src/tangents
	$(BIN)/python -m pytest docs README.md -p no:cacheprovider

examples: $(STAMP)
	set -e; for f in $(filter-out examples/tensorflow_%,$(wildcard examples/*.py)); do echo "== $$f"; $(BIN)/python $$f; done

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

bench: $(STAMP)
	bash benchmarks/peer/setup
	$(BIN)/python -m benchmarks

bench-gpu:
	$(PYTHON) -m benchmarks --gpu

clean:
	rm -rf $(VENV) .venv-* site tangents-demo .pytest_cache .hypothesis .ruff_cache
