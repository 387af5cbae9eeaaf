# make study   installs and runs the study on scikit-learn's digits     make test   installs and tests
# make check   linters, layers, type checker                            make bench  every benchmark at its smallest size
# make hosts   a study over two hosts, where the machine allows them    make kills  ten kills of a study
# make gpu     tests and times a GPU; installs nothing                  make clean  removes the environment and results/
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install study test hosts kills check bench gpu clean

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

# Minutes each. The hosts are played by namespaces (as root, with sshd and rsync; else skipped).
hosts: install
	DFKT_FAULTS=1 $(BIN)/python -m pytest tests/cluster

kills: install
	DFKT_FAULTS=1 $(BIN)/python -m pytest tests/faults/test_kills.py

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
	$(BIN)/python benchmarks/growing.py --machines 1 --trials 2 --epochs 3
	$(BIN)/python benchmarks/scale.py --trials 60 --at-once 10 --epochs 5
	$(BIN)/python benchmarks/study.py --trials 2 --epochs 9 --images 300 --precision float32
	$(BIN)/python benchmarks/study.py --profile --epochs 5 --images 300 --precision float32
	$(BIN)/python benchmarks/accuracy.py --methods scratch dfkt --seeds 2 --epochs 2 --at-once 2 -- --teacher-epochs 1
	$(BIN)/python benchmarks/weights.py --trials 4 --searches 1 --teacher-epochs 2

# As the machine stands: the environment if there is one, plugins of pytest or not. GPU_FLAGS=--quick is shorter.
GPU_PYTHON = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_TESTS = -m gpu tests/gpu -o "addopts=--import-mode=importlib -ra" -o filterwarnings=default -o timeout=300
GPU_FLAGS ?=

gpu:
	@PYTHONPATH=. $(GPU_PYTHON) tests/gpu/ready.py; ready=$$?; \
	if [ $$ready = 3 ]; then exit 0; fi; [ $$ready = 0 ] || exit $$ready; \
	PYTHONPATH=. $(GPU_PYTHON) -m pytest $(GPU_TESTS); tested=$$?; \
	PYTHONPATH=. $(GPU_PYTHON) benchmarks/gpu.py $(GPU_FLAGS) && exit $$tested

clean:
	rm -rf $(VENV) results
