# make demo   the quickstart: four arms, one table, quickstart.png
# make test   the whole test suite          make lint   format, lint, types
# make bench  the overhead table (results in benchmarks/results/)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench conformance clean
demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

# The conformance suite alone, as CI runs it once more with the newest JAX: make conformance VENV=.venv312 PYTHON=python3.12
conformance: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 tests/test_conformance.py tests/test_guard.py tests/test_accumulation.py

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/overhead.py
	$(BIN)/python benchmarks/norm_histories.py

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group test --group lint
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis dist
