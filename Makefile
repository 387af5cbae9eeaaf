# make study   installs and runs the study on scikit-learn's digits     make test   installs and tests
# make check   linters and type checker                                 make clean  removes the environment and results/
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install study test check clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

study: install
	$(BIN)/python studies/digits_sweep.py

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) results
