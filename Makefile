# make demo   the quickstart: four arms, one table, quickstart.png
# make test   the test suite                make lint   format, lint, types
# make test-all  the same with what takes long
# make upstream  Optax's own tests, with its optimizers guarded
# make fuzz   random stacks under random faults, for SECONDS=3600   make mutants  breaks the control logic and counts what no test notices
# make docs   the documentation site, in site/   make api  its reference pages alone, in docs/api/
# make article  the article's programme: docs/benchmarks/article.md, its picture and numbers, a few minutes
# make bench  the performance record: docs/benchmarks/performance.md, its pictures and numbers, some 25 minutes
# make bench-stability  StabilityBench: docs/benchmarks/stability_bench.md, its pictures and numbers, 2.3 core hours
# make bench-histories  the table of docs/rules/norm_history.md, two minutes
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo article test test-all upstream fuzz mutants lint bench bench-stability bench-histories docs api conformance clean
demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

article: $(VENV)/.installed
	$(BIN)/python examples/article.py --write-docs

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2

upstream: $(VENV)/.installed
	$(BIN)/python tests/upstream/optax_tests.py -n 2

SECONDS ?= 3600
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants.py

# The conformance suite alone, as CI runs it once more with the newest JAX: make conformance VENV=.venv312 PYTHON=python3.12
conformance: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow" tests/conformance tests/guard tests/accumulation

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.performance

bench-stability: $(VENV)/.installed
	$(BIN)/python -m benchmarks.stability

bench-histories: $(VENV)/.installed
	$(BIN)/python benchmarks/norm_histories.py --write-docs

api: $(VENV)/.installed
	$(BIN)/python docs/build_api.py

# Both generators build the same mkdocs.yml; MkDocs checks links and fails on a warning, Zensical is its successor.
docs: api
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	$(BIN)/mkdocs build --strict --site-dir site/mkdocs
	$(BIN)/zensical build --clean --strict
	@echo "open site/index.html"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group test --group lint
	touch $@

clean:
	rm -rf $(VENV) site docs/api .pytest_cache .ruff_cache .hypothesis dist
