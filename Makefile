# Options: PYTHON=<interpreter of the new .venv>  PIP_ARGS=<more for pip install>  ARGS=<more for the command>  WORKERS=<n>

# Lazy: the first of these that runs and is new enough.
PYTHON ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell \
	$(name) -c 'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
WORKERS ?= 2

PY := .venv/bin/python
PIP = $(PY) -m pip install --disable-pip-version-check -c constraints.txt $(PIP_ARGS)

# The stamp's name changes with what is installed, so that a finished `make venv` costs nothing.
INPUTS := pyproject.toml setup.py CMakeLists.txt constraints.txt $(sort $(wildcard csrc/*))
SUM := $(firstword $(shell cat $(INPUTS) | cksum))
STAMP := .venv/.installed-$(SUM)
SIMULATORS := .venv/.simulators-$(SUM)

# Without an NVIDIA driver the CPU build of PyTorch is enough, where its index can be reached.
CPU_WHEELS := https://download.pytorch.org/whl/cpu/
TORCH_INDEX = $(shell nvidia-smi >/dev/null 2>&1 || \
	{ timeout 5 $(PY) -c 'import urllib.request as u; u.urlopen("$(CPU_WHEELS)", timeout=3)' 2>/dev/null \
	&& echo --extra-index-url $(CPU_WHEELS); })

.PHONY: help venv simulators run test coverage native lint types bench clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 16

venv: $(STAMP) ## make .venv with the package (editable), its C++ extension and the development tools

simulators: $(SIMULATORS) ## add robosuite, for Robomimic's tasks (1.1 GB)

run: venv ## fine-tune the shipped Hopper policy
	$(PY) -m dppo_fast.train cfg=quickstart $(ARGS)

test: simulators ## run all tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist loadscope $(ARGS)

coverage: simulators ## run all tests and tell how much of dppo_fast and kernels they run
	OMP_NUM_THREADS=1 $(PY) -m pytest --cov -n $(WORKERS) --dist loadscope $(ARGS)

native: venv ## build the C++ extension again, failing loudly
	DPPO_FAST_REQUIRE_NATIVE=1 $(PY) setup.py build_ext --inplace

lint: venv ## check style and formatting
	$(PY) -m ruff check
	$(PY) -m ruff format --check

types: venv ## check types
	$(PY) -m mypy --strict dppo_fast benchmarks

bench: venv ## run the microbenchmarks on the CPU (with a GPU, for CSV: python -m benchmarks.run)
	$(PY) -m pytest benchmarks/test_ops.py --benchmark-only -q $(ARGS)

clean: ## remove build outputs and caches, keep .venv
	rm -rf build dist *.egg-info dppo_fast/_native*.so .venv/.installed-* .venv/.simulators-*
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .coverage*
	find . -path ./.venv -prune -o -name __pycache__ -type d -exec rm -rf {} +

.venv/bin/python:
	@test -n '$(PYTHON)' || { echo 'make venv needs Python 3.11 or 3.12, found none: name one with PYTHON=<path>'; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "make venv needs Python's venv module:" \
		'sudo apt install $(notdir $(PYTHON))-venv (and for the C++ extension: g++ python3-dev)'; exit 1; }
	$(PYTHON) -m venv .venv

$(STAMP): | .venv/bin/python
	$(PIP) setuptools pybind11 cmake ninja
	$(PIP) $(TORCH_INDEX) torch
	$(PIP) --no-build-isolation -e '.[dev]'
	@$(PY) -c 'from dppo_fast.runtime.native import native; print("C++ extension:", "built" if native() else "not built")'
	@rm -f .venv/.installed-* && touch $@

$(SIMULATORS): $(STAMP)
	$(PIP) --no-build-isolation -e '.[robomimic]'
	@rm -f .venv/.simulators-* && touch $@
