# Every target makes its own environment in .venv when it is missing.
#   make demo        train a VAE on real digits and draw it (a minute)
#   make test        the test suite, quick profile;  make test-long: hypothesis searches for an hour
#   make bench       the benchmarks;  make bench-cpu: the CPU table, against what people use today
#   make check       ruff, ruff format, mypy
#   make clean       remove everything that was built or drawn

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := torch==2.13.0
BUILT  := $(VENV)/built
SOURCES := CMakeLists.txt pyproject.toml $(wildcard kernels/include/* kernels/cpu/*)

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)

.PHONY: demo test test-long bench bench-cpu check clean

demo: $(BUILT)
	$(BIN)/python -m fastvae demo

test: $(BUILT)
	FASTVAE_REQUIRE_NATIVE=1 $(BIN)/python -m pytest

test-long: $(BUILT)
	FASTVAE_REQUIRE_NATIVE=1 FASTVAE_HYPOTHESIS=long $(BIN)/python -m pytest

bench: $(BUILT)
	$(BIN)/python -m pytest bench --benchmark-only

bench-cpu: $(BUILT)
	$(BIN)/python -m bench.cpu

check: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist demo-out .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks

# torch comes first and pinned, so that nothing below can choose another build of it.
$(BIN)/torch-installed:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(BUILT): $(BIN)/torch-installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[demo,test,bench,dev]' $(if $(CI),--config-settings=cmake.define.FASTVAE_WERROR=ON)
	touch $@
