# `make` lists the targets. `make demo` and `make test` do all their own set-up.
#
# PYTHON=python3.12 make test        another interpreter for the virtual environment
# NO_VENV=1 PYTHON=python make test  that environment as it is: installs nothing, needs no network
# ARGS="-k bn_act -x" make test      arguments for the command that the target runs
#
# torch is pinned in requirements/build.txt, and pip takes the build of it that its index offers:
# on Linux that can be the CUDA one, several gigabytes. For a smaller or another build set pip's own
# PIP_INDEX_URL or PIP_FIND_LINKS, or use NO_VENV=1 with an environment that has torch >= 2.10.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# GPUs that `make wheel` and `make gate` compile CUDA kernels for (fusedres/toolchain.py); empty: none.
ARCHS ?= all
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

LIBRARY := fusedres/_C.so
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
CLANG_FORMAT = $(PY) -c "import clang_format; clang_format.clang_format()"
# A process a core, one thread each: most tensors are too small for two. ARGS="-n 0" for one process.
PYTEST = OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 8 --dist loadfile
SANITIZED := build/sanitize/fusedres/_C.so
OP_TESTS = $(patsubst %,tests/test_%.py,bn_act squeeze_excite bn_se_act residual_mix residual_add \
	conv_stats conv_bn_act add_norm highway lstm densenet)

ifneq ($(filter-out 0,$(NO_VENV)),)
PY := $(PYTHON)
else
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/stamps
BUILD_READY := $(STAMPS)/editable
DEMO_READY := $(STAMPS)/demo
TEST_READY := $(STAMPS)/test $(STAMPS)/wheel $(STAMPS)/cuda
BENCH_READY := $(STAMPS)/bench
LINT_READY := $(STAMPS)/lint
WHEEL_READY := $(STAMPS)/build $(STAMPS)/wheel $(if $(ARCHS),$(STAMPS)/cuda)
endif

.PHONY: help demo test build lint lint-python lint-cpp format bench gate sanitize wheel clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo; sed -n '3,/^#$$/s/^# /  /p' $(MAKEFILE_LIST)

demo: build $(DEMO_READY) ## train on real images with plain and with fused blocks, and compare
	$(PY) -m fusedres demo $(ARGS)

test: build $(TEST_READY) ## run the tests
	$(PYTEST) $(ARGS)

build: $(LIBRARY) $(BUILD_READY) ## compile the library (again, where a source changed)

lint: lint-python lint-cpp ## check style; pre-commit runs the same two targets

lint-python: $(LINT_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

lint-cpp: $(LINT_READY)
	$(CLANG_FORMAT) --dry-run --Werror $(CPP)

format: $(LINT_READY) ## rewrite the sources in the house style
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(CLANG_FORMAT) -i $(CPP)

bench: build $(BENCH_READY) ## run a few minutes of benchmarks; FULL=1: all of them, for hours
	$(PY) -m fusedres bench $(ARGS)

gate: build $(TEST_READY) ## compile the Triton and CUDA kernels for every GPU generation; print what they cost
	$(PY) tests/compile_gate.py $(ARGS)
	$(if $(ARCHS),$(PY) tests/cuda_gate.py $(ARCHS:all=))

sanitize: $(SANITIZED) $(TEST_READY) ## run the op tests on an ASan + UBSan build of the C++
	LD_PRELOAD="$$($${CXX:-g++} -print-file-name=libasan.so) $$($${CXX:-g++} -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	FUSEDRES_LIBRARY=$(abspath $(SANITIZED)) $(PYTEST) -k "not reference" $(ARGS) $(OP_TESTS)

# auditwheel names the oldest Linux that the wheel runs on; torch's libraries are torch's.
wheel: $(WHEEL_READY) ## build a wheel into dist/ for every GPU; ARCHS=90a: for that one, ARCHS=: for CPUs
	rm -rf build/wheel build/lib*
	FUSEDRES_CUDA_ARCHS="$(ARCHS)" $(PY) -m pip wheel . --no-build-isolation --no-deps --wheel-dir build/wheel
	PATH="$(abspath $(dir $(PY))):$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*' \
	--exclude libc10.so --wheel-dir dist build/wheel/*.whl

clean: ## remove everything that was built, the virtual environment included
	rm -rf build dist $(VENV) fusedres-demo *.egg-info $(LIBRARY)
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ninja knows which objects are stale, so it is always asked.
$(LIBRARY): FORCE $(if $(STAMPS),| $(STAMPS)/build)
	$(PY) setup.py --quiet build_ext --inplace

$(SANITIZED): FORCE $(if $(STAMPS),| $(STAMPS)/build)
	FUSEDRES_SANITIZE=address,undefined $(PY) setup.py --quiet build_ext --build-lib build/sanitize

FORCE:

ifdef STAMPS
$(PY):
	$(PYTHON) -m venv $(VENV)

$(STAMPS)/build: requirements/build.txt | $(PY)
	$(PIP) install -r requirements/build.txt
	mkdir -p $(@D) && touch $@

$(STAMPS)/editable: pyproject.toml setup.py $(STAMPS)/build | $(LIBRARY)
	$(PIP) install --no-build-isolation --no-deps -e .
	touch $@

$(STAMPS)/demo: requirements/demo.txt $(STAMPS)/build
	$(PIP) install -r requirements/demo.txt
	touch $@

$(STAMPS)/test: requirements/test.txt requirements/test-no-deps.txt $(STAMPS)/demo
	$(PIP) install -r requirements/test.txt
	$(PIP) install --no-deps -r requirements/test-no-deps.txt
	touch $@

$(STAMPS)/bench: requirements/bench.txt $(STAMPS)/test
	$(PIP) install -r requirements/bench.txt
	touch $@

$(STAMPS)/wheel: requirements/wheel.txt | $(PY)
	$(PIP) install -r requirements/wheel.txt
	mkdir -p $(@D) && touch $@

# nvcc, where the machine has none
$(STAMPS)/cuda: requirements/cuda.txt | $(PY)
	$(PY) fusedres/toolchain.py || $(PIP) install -r requirements/cuda.txt
	mkdir -p $(@D) && touch $@

$(STAMPS)/lint: requirements/lint.txt | $(PY)
	$(PIP) install -r requirements/lint.txt
	mkdir -p $(@D) && touch $@
endif
