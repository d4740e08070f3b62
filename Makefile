# Needs make, and Python 3.10 or later with its venv module. Everything goes into .venv.
PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_ROOT_USER_ACTION = ignore

.PHONY: install test test-all demo lint bench clean

install: .venv/.installed

# A venv without pip is one whose making was interrupted, so it is made again.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "envship needs Python 3.10 or later; say which with: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear .venv
	$(BIN)/pip install --quiet --editable ".[test,dev]"
	touch $@

test: install
	$(BIN)/python -m pytest -m "not heavy" --durations=10 --numprocesses=2 --dist=worksteal

test-all: test
	$(BIN)/pip install --quiet --only-binary atheris --editable ".[fuzz]" || echo "no atheris here: those tests are skipped"
	$(BIN)/python -m pytest -m heavy

demo: install
	$(BIN)/envship demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install
	$(BIN)/python benchmarks/swap.py

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis dist
