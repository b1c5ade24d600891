# Every target makes its own environment in .venv when it is missing.
#   make demo        train a VAE on real digits and draw it (a minute)
#   make test        the test suite, quick profile;  make test-quick: without what takes long, in under two minutes;
#                    make test-long: hypothesis searches for an hour
#   make fuzz        generated calls of everything public, for SECONDS=60 or COUNT=n of them, from SEED=0 on
#   make bench       the benchmarks and their report, in under ten minutes;  make bench-cpu: those with a target, and the
#                    table of targets (ONLY=kl_gauss: of one op);  make bench-smoke: a trial that measures nothing
#   make bench-compare BASE=<commit>  this tree against a commit, call by call: faster, slower, or within noise
#                    (COUNT=1: instructions instead of times, by valgrind)
#   make check       ruff, ruff format, mypy, import-linter
#   make sanitize    the native tests under the address, undefined-behaviour and thread sanitizers
#   make cuda        the CUDA C++ kernels too, by nvcc; without one, or where it fails, `fastvae info` says why
#   make gpu-library the same for an H100 or H200 alone, with bulk copies and without, where bench/gpu/run.sh looks
#   make triton-3.6  the compile checks with Triton 3.6, which belongs to torch 2.11, where `make test` has 3.7
#   make neon        the kernels for AArch64, by a cross-compiler, checked on an emulated CPU (qemu-user)
#   make dist        the source distribution, a wheel for this system and the pure one, in dist/, and what checks them
#   make clean       remove everything that was built or drawn

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Triton of the same release, which a CPU build of torch does not bring.
TORCH  := torch==2.13.0 "triton==3.7.1; platform_system == 'Linux'"
BUILT  := $(VENV)/built
NATIVE_TESTS := -k "native or (test_every_op and (compile or transforms))"
WERROR := $(if $(CI),--config-settings=cmake.define.FASTVAE_WERROR=ON)
SOURCES := CMakeLists.txt pyproject.toml packaging/build_backend.py kernels/python/calls.c $(wildcard kernels/include/*.h kernels/cpu/*.h kernels/cpu/*.cpp)

export CMAKE_BUILD_PARALLEL_LEVEL ?= $(shell nproc)
# Nothing is installed, and no test skipped, for want of what cannot be compiled.
export FASTVAE_REQUIRE_NATIVE := 1

.PHONY: demo test test-quick test-long fuzz bench bench-cpu bench-smoke bench-compare check sanitize gpu-library triton-3.6 neon dist clean

demo: $(BUILT)
	$(BIN)/python -m fastvae demo

test: $(BUILT)
	$(BIN)/python -m pytest -n auto

test-quick: $(BUILT)
	$(BIN)/python -m pytest -n auto --quick

test-long: $(BUILT)
	FASTVAE_HYPOTHESIS=long $(BIN)/python -m pytest

SECONDS ?= 60
SEED ?= 0
fuzz: $(BUILT)
	$(BIN)/python tests/fuzz --seed $(SEED) $(if $(COUNT),--count $(COUNT),--seconds $(SECONDS))

bench: $(BUILT)
	mkdir -p build/bench
	$(BIN)/python -m pytest bench --benchmark-only --benchmark-json=build/bench/all.json
	$(BIN)/python -m bench.cpu.report build/bench/all.json

bench-cpu: $(BUILT)
	mkdir -p build/bench
	$(BIN)/python -m pytest bench -q -m target -k "$(ONLY)" --benchmark-only --benchmark-json=build/bench/targets.json
	$(BIN)/python -m bench.cpu.report --targets build/bench/targets.json

bench-smoke: $(BUILT)
	$(BIN)/python -m pytest bench -q --benchmark-disable

bench-compare: $(BUILT)
	$(BIN)/python -m bench.cpu.compare "$(BASE)" $(if $(COUNT),--count)

check: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Leaks are not looked for: Python itself leaks at exit. The thread sanitizer does not understand OpenMP's runtime,
# so it watches a driver that has none, and so computes on the library's own pool; without forks, which it does not
# survive in a process of several threads (tests/install/compiler.sh has them).
sanitize: $(BUILT)
	$(BIN)/cmake -S . -B build/address -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DFASTVAE_SANITIZE=address,undefined
	$(BIN)/cmake --build build/address
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  FASTVAE_LIBRARY=build/address/libfastvae_cpu.so $(BIN)/python -m pytest -q $(NATIVE_TESTS)
	$(BIN)/cmake -S . -B build/thread -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DFASTVAE_SANITIZE=thread -DFASTVAE_THREADS_TEST=ON
	$(BIN)/cmake --build build/thread
	build/thread/fastvae_threads --no-fork
	$(BIN)/cmake -S . -B build/address-cuda -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DFASTVAE_CUDA=HOST \
	  -DFASTVAE_SANITIZE=address,undefined
	$(BIN)/cmake --build build/address-cuda
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  FASTVAE_CUDA_LIBRARY=build/address-cuda/libfastvae_cuda.so $(BIN)/python -m pytest -q -k "cuda-host and test_sizes"

cuda: $(BUILT)
	$(BIN)/python -m pip install --quiet --no-deps --editable . \
	  --config-settings=cmake.define.FASTVAE_CUDA=ON $(WERROR)
	$(BIN)/python -m fastvae info

gpu-library: build/gpu/libfastvae_cuda.so build/gpu/nobulk/libfastvae_cuda.so
build/gpu/libfastvae_cuda.so: BULK := 1
build/gpu/nobulk/libfastvae_cuda.so: BULK := 0
build/gpu/libfastvae_cuda.so build/gpu/nobulk/libfastvae_cuda.so: $(BUILT) $(wildcard kernels/include/* kernels/cuda/*)
	mkdir -p $(@D)
	$(BIN)/cmake -DSOURCE=$(CURDIR) -DOUTPUT=$(CURDIR)/$(@D) -DVERSION="$$(git describe --always --dirty)" -DWERROR=ON \
	  -DARCHITECTURES=90 -DBULK=$(BULK) -P kernels/cuda/build.cmake
	test -f $@

# Triton alone, from a folder that comes first: torch is the same.
build/triton-3.6/installed: $(BUILT)
	rm -rf $(@D)
	$(BIN)/python -m pip install --quiet --no-deps --target $(@D) triton==3.6.0
	touch $@

triton-3.6: build/triton-3.6/installed
	PYTHONPATH=$(CURDIR)/build/triton-3.6 $(BIN)/python -m pytest -q tests/backends/test_triton_compile.py tests/bench/test_cold_start.py

# A process of several threads that forks is beyond qemu-user 7.
neon: $(BUILT)
	$(BIN)/cmake -S . -B build/neon -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(BIN)/ninja -DFASTVAE_THREADS_TEST=ON \
	  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
	$(BIN)/cmake --build build/neon
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/neon/fastvae_threads --no-fork

dist: $(BUILT)
	rm -rf dist
	$(BIN)/python -m pip install --quiet build twine check-wheel-contents auditwheel
	$(BIN)/python -m build
	$(BIN)/python -m build --wheel -Cwheel.cmake=false
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	$(BIN)/auditwheel show dist/*-linux_*.whl
	ls -l dist

clean:
	rm -rf $(VENV) build dist demo-out .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache .benchmarks

# torch comes first and pinned, so that nothing below can choose another build of it.
$(BIN)/torch-installed:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

$(BUILT): $(BIN)/torch-installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable '.[demo,test,bench,dev]' $(WERROR)
	touch $@
