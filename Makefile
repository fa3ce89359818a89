# Every target sets up what it needs. PYTHON is asked only once, to make .venv.
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
STAMP := .venv/.stamp
SOURCES := triton_deq $(wildcard bench)

.PHONY: help demo test lint docs clean
.DEFAULT_GOAL := help

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "  Options are passed in ARGS, e.g. make demo ARGS=--quick or make test ARGS='-k anderson'."

demo: $(STAMP) ## See the library accelerate, stabilise and verify a DEQ
	@$(BIN)/triton-deq demo $(ARGS)

test: $(STAMP) ## Run the tests
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile $(ARGS)

lint: $(STAMP) ## Check style, format and types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy $(SOURCES)

docs: $(STAMP) ## Build the documentation into build/docs
	@$(BIN)/python -m sphinx -q -W --keep-going -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

clean: ## Remove built files and caches; .venv stays
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find . -path ./.venv -prune -o -type d -name __pycache__ -prune -exec rm -rf {} +

# An environment without a working pip is the rest of an interrupted run: it is made anew.
# Our own build uses the setuptools of .venv, so that it is pinned like everything else.
$(STAMP): pyproject.toml setup.py constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	        echo "triton-deq needs Python 3.11 or newer, and '$(PYTHON)' is not." \
	             "Name another: make PYTHON=python3.12 ..." >&2; exit 1; }; \
	    $(PYTHON) -m venv --clear .venv; }
	@echo "Setting up .venv (the first time takes minutes: PyTorch is large)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	    --no-build-isolation -e '.[demo,bench,profile,docs,dev]'
	@touch $@
