#!/usr/bin/env bash
# compiler.sh CXX [tests]: `pip install .` by that compiler, warnings being errors, then check.py, the driver of threads
# and forks (tests/native/threads.cpp), and, where asked for, the tests of the library and the quick ones that compute
# with it.
source "$(dirname "$0")/common.sh"
CXX=$1
command -v "$CXX" > /dev/null || fail "$CXX is not here"

environment "$work/env"
python=$work/env/bin/python
CXX=$CXX FASTVAE_REQUIRE_NATIVE=1 "$python" -m pip install --quiet --no-deps "$work/source" \
  --config-settings=cmake.define.FASTVAE_WERROR=ON --config-settings=cmake.define.FASTVAE_THREADS_TEST=ON \
  --config-settings=build-dir="$work/build"
check "$python" native
"$work/build/fastvae_threads"

if [ "${2:-}" = tests ]; then
  cd "$work/source"
  # The tree is what Python imports in its root; it computes with the library that was installed.
  export FASTVAE_REQUIRE_NATIVE=1
  "$python" -m pytest -q -n auto -p no:cacheprovider tests/backends/test_native_library.py
  "$python" -m pytest -q -n auto -p no:cacheprovider --quick -k native
fi
