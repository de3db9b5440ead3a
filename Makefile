# make demo   the quickstart: five ways to take the step, one table, quickstart.png
# make test   the test suite                make lint   format, lint, types
# make test-all  all of it: the slow tests, the compiler of users, the form of a GPU, Optax's own tests
# make upstream  Optax's own tests, with its optimizers guarded; EVERY=10: each tenth
# make fuzz   random stacks under random faults, for SECONDS=3600   make mutants  breaks the control logic and counts the changes that no test detects
# make dist   builds sdist and wheel in dist/ and checks both: the sdist unpacked, the wheel in an empty environment
# make lowest some of the tests with the lowest supported JAX, Optax and Flax, in a separate environment
# make libraries  the programs of docs/libraries.md with the libraries they are for, in a separate environment
# make docs   the documentation site, in site/   make api  only its reference pages, in docs/api/
# make notebooks  docs/notebooks: the notebooks of examples/notebooks with their outputs, two minutes each
# make article  the article's experiments: docs/benchmarks/article.md, its picture and numbers, a few minutes
# make bench  the performance record: docs/benchmarks/performance.md, its pictures and numbers, some 25 minutes
# make bench-stability  StabilityBench: docs/benchmarks/stability_bench.md, its pictures and numbers, 2.3 core hours
# make bench-attention  what holds attention logits: the tables and pictures of docs/attention/index.md; minutes on a GPU
# make accelerators  what a step costs on a TPU and a GPU, by their compilers, without either; ARGS=--tpu, ARGS=--gpu: one
# make bench-large  two large tasks and the study of neutrality: docs/benchmarks/large.md; ARGS="--seconds 600 --workers 2"
# make bench-histories  the table of docs/rules/norm_history.md, two minutes
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo article test test-all libraries upstream fuzz mutants lint bench bench-stability bench-large bench-histories bench-attention accelerators docs api notebooks conformance dist lowest clean
demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

article: $(VENV)/.installed
	$(BIN)/python examples/article.py --write-docs

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow"

# Every test once; then some once more, compiled as users compile (tests/compiling.py) and in the form that a GPU gets
# (docs/design.md); and Optax's own tests. .ci/run takes less of the last three, and says why.
USERS_TESTS ?= tests/guard tests/rules tests/accumulation tests/common
GPU_TESTS ?= tests/conformance
test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2
	COMPILER=users $(BIN)/python -m pytest -n 2 -m "not slow" $(USERS_TESTS)
	FORM=gpu $(BIN)/python -m pytest -n 2 -m "not slow" $(GPU_TESTS)
	$(MAKE) upstream

EVERY ?= 1
upstream: $(VENV)/.installed
	EVERY=$(EVERY) $(BIN)/python tests/upstream/optax_tests.py -n 2

SECONDS ?= 3600
fuzz: $(VENV)/.installed
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

mutants: $(VENV)/.installed
	$(BIN)/python tests/mutants.py

# The conformance suite alone, as CI runs it once more with the newest JAX: make conformance VENV=.venv312 PYTHON=python3.12
conformance: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 -m "not slow" tests/conformance tests/guard tests/accumulation

dist: $(VENV)/.installed
	PYTHON=$(PYTHON) .ci/dist $(BIN)/python

# The lower bounds of pyproject.toml are the versions that this installs; everything else is what `make test` has, and
# newer than them: what it does that JAX has deprecated since is none of ours.
LOWEST := .venv-lowest
LOWEST_TESTS ?= tests/conformance tests/guard/test_guard.py tests/common/test_layout.py
lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n 2 -m "not slow" -W ignore::DeprecationWarning $(LOWEST_TESTS)

$(LOWEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	grep -Ev '^(jax|jaxlib|optax|flax)==' constraints.txt >$(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt --group lowest
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --constraint $(LOWEST)/constraints.txt \
		--resolution lowest-direct --editable '.[flax]'
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST) --constraint $(LOWEST)/constraints.txt --group test
	touch $@

# Other libraries in the versions that docs/libraries.md names, with the JAX of `make test`.
LIBRARIES := .venv-libraries
libraries: $(LIBRARIES)/.installed
	$(LIBRARIES)/bin/python -m pytest tests/pages/test_libraries.py

$(LIBRARIES)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(LIBRARIES)
	$(LIBRARIES)/bin/python -m pip install --quiet --upgrade pip
	$(LIBRARIES)/bin/python -m pip install --quiet --constraint constraints.txt --editable . --group test --group libraries
	touch $@

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(VENV)/.installed
	$(BIN)/python -m benchmarks.performance

bench-stability: $(VENV)/.installed
	$(BIN)/python -m benchmarks.stability

bench-large: $(VENV)/.installed
	$(BIN)/python -m benchmarks.stability.large $(ARGS)

bench-histories: $(VENV)/.installed
	$(BIN)/python benchmarks/norm_histories.py --write-docs

bench-attention: $(VENV)/.installed
	$(BIN)/python benchmarks/attention.py

# In an environment of its own, .venv-accelerators, which needs Python 3.12 and makes itself.
accelerators:
	$(PYTHON) benchmarks/accelerators/environment.py $(ARGS)

api: $(VENV)/.installed
	$(BIN)/python docs/build_api.py

notebooks: $(VENV)/.installed
	$(BIN)/python docs/build_notebooks.py

# Both generators build the same mkdocs.yml; MkDocs checks links and fails on a warning, Zensical is its successor.
docs: api
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group docs
	$(BIN)/mkdocs build --strict --site-dir site/mkdocs
	$(BIN)/zensical build --clean --strict
	@echo "open site/index.html; for the search: $(PYTHON) -m http.server --directory site"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable . --group test --group lint
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(LIBRARIES) .venv-accelerators site docs/api .pytest_cache .ruff_cache .hypothesis dist
