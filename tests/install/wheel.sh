#!/usr/bin/env bash
# wheel.sh [WHEEL]: a wheel, by default one that is built now, installed far from the sources where there is no compiler.
# PYTHON may be another version than the one that built it.
source "$(dirname "$0")/common.sh"

environment "$work/env"
python=$work/env/bin/python
wheel=${1:-}
if [ -z "$wheel" ]; then
  FASTVAE_REQUIRE_NATIVE=1 "$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$work/source"
  wheel=$(echo "$work"/fastvae-*.whl)
fi
wheel=$(realpath "$wheel")
rm -rf "$work/source"

without_compilers "$python" -m pip install --quiet --no-deps "$wheel"
case $wheel in
  *-none-any.whl) check "$python" pure ;;
  *) check "$python" native ;;
esac
cd "$work/empty"
"$python" -m fastvae --version
"$python" -m fastvae info > info.txt
! grep -q "make cuda" info.txt || fail "info advises make, without a Makefile"
