# make study   installs and runs the study on scikit-learn's digits     make test   installs and tests
# make check   linters, layers, type checker                            make bench  every benchmark at its smallest size
# make clean   removes the environment and results/
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install study test check bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@

study: install
	$(BIN)/python studies/digits_sweep.py

test: install
	$(BIN)/python -m pytest -n auto --dist loadgroup

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/mypy benchmarks studies docs

bench: install
	$(BIN)/python -m pip install --quiet -e ".[benchmark]"
	$(BIN)/python benchmarks/flow_step.py --steps 1 --repeats 1
	$(BIN)/python benchmarks/store.py --trials 64
	$(BIN)/python benchmarks/overhead.py --trials 6
	$(BIN)/python benchmarks/weights.py --trials 4 --searches 1 --teacher-epochs 2

clean:
	rm -rf $(VENV) results
