# Two commands on a machine with Python 3.11+, git and a C++ compiler: `make demo` and `make test`.
# Both work in .venv/, which is made here and touched by nothing else.
#
# TORCH is handed to pip as it stands. The default on Linux brings PyTorch's CUDA libraries (several GB); for the CPU alone:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
INPUTS := pyproject.toml setup.py $(wildcard csrc/*/*)
# Build isolation would download a second torch to compile against; the installed one is the right one.
INSTALL := $(BIN)/pip install --quiet --no-build-isolation --editable

.PHONY: demo test test-gpu bench-gpu lint types clean

demo: .venv/demo
	$(BIN)/python bench/demo.py

test: lint types
	$(BIN)/python -m pytest -n 2 -m "not alone"
	$(BIN)/python -m pytest -m alone

# On a machine with a GPU, in the Python environment (PYTHON) that has torch for it: test-gpu needs pytest, bench-gpu
# nothing more. --no-deps leaves that torch and its triton alone.
GPU_INSTALL = $(PYTHON) -m pip install --quiet --no-build-isolation --no-deps --editable .

test-gpu:
	$(GPU_INSTALL)
	$(PYTHON) -m inductor_ext doctor
	$(PYTHON) -m pytest tests/test_hip_*.py tests/test_gpu*.py tests/test_triton_gemm*.py tests/test_*_numbers.py
	$(PYTHON) -m pytest -k gpu tests/test_rdna3_*.py

bench-gpu:
	$(GPU_INSTALL)
	$(PYTHON) bench/dense_gpu.py
	$(PYTHON) bench/moe_gpu.py
	$(PYTHON) bench/mxfp4_gpu.py

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# patterns/ is installed as inductor_ext.patterns; mypy reads a tree of links in which it already stands there.
types: .venv/test
	rm -rf build/types && mkdir -p build/types/inductor_ext
	ln -s "$(CURDIR)"/inductor_ext/* "$(CURDIR)"/patterns build/types/inductor_ext
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml

# Said here, before gigabytes are fetched.
need = @$(1) >/dev/null 2>&1 || { echo "$(2)"; exit 1; }

.venv/torch:
	$(call need,$(PYTHON) -c 'import sys; sys.exit(sys.hexversion < 0x030b0000)',$(PYTHON) is not Python 3.11 or newer; name one that is: make PYTHON=python3.12 ...)
	$(call need,$(PYTHON) -c 'import sysconfig; open(sysconfig.get_path("include") + "/Python.h")',Python.h is missing and Inductor compiles against it: apt install python3-dev)
	$(call need,command -v $${CXX:-g++},no C++ compiler: apt install g++ or set CXX)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/pip install $(TORCH)
	touch $@

.venv/demo: .venv/torch $(INPUTS)
	$(INSTALL) ".[demo]"
	touch $@

# The compiler of the AMD kernels comes first: the package is built before what its extras name is installed.
.venv/test: .venv/torch $(INPUTS)
	$(BIN)/pip install --quiet $(shell sed -n 's/^ *\("ziglang.*"\),$$/\1/p' pyproject.toml)
	$(INSTALL) ".[test,dev]"
	touch $@

clean:
	rm -rf .venv build dist *.egg-info inductor_ext/*.so inductor_ext/kernels/hip/objects .mypy_cache .pytest_cache .ruff_cache .hypothesis
