#!/usr/bin/env bash
# `pip install .` where nothing compiles: the package is installed without its library, computes by its reference, and
# says why; with FASTVAE_REQUIRE_NATIVE=1 the installation fails. A compiler that is too old is refused by name.
source "$(dirname "$0")/common.sh"

environment "$work/env"
python=$work/env/bin/python
if FASTVAE_REQUIRE_NATIVE=1 without_compilers "$python" -m pip install --no-deps "$work/source" > "$work/log" 2>&1; then
  fail "FASTVAE_REQUIRE_NATIVE=1 let an installation without the library pass"
fi
grep -q "No CMAKE_CXX_COMPILER could be found" "$work/log" || fail "$(cat "$work/log")"

without_compilers "$python" -m pip install --quiet --no-deps "$work/source"
check "$python" pure
(cd "$work/empty" && "$python" -m fastvae info) | tee "$work/info"
grep -q "native .*which no compiler has built.*FASTVAE_REQUIRE_NATIVE=1 pip install" "$work/info"
! grep -q "make cuda" "$work/info" || fail "info advises make, without a Makefile"

# An old compiler, as CMake sees one.
printf '#!/bin/sh\ncase "$*" in *CMakeCXXCompilerId*) set -- "$@" -U__GNUC__ -D__GNUC__=10;; esac\nexec g++ "$@"\n' \
  > "$work/g++-10"
chmod +x "$work/g++-10"
if CXX=$work/g++-10 FASTVAE_REQUIRE_NATIVE=1 \
  "$python" -m pip install --no-deps --force-reinstall "$work/source" > "$work/log" 2>&1; then
  fail "g++ 10 was not refused"
fi
grep -q "g++ 11, Clang 14 and AppleClang 14 compile" "$work/log" || fail "$(cat "$work/log")"
echo "the reference computes and says why; g++ 10 is refused"
