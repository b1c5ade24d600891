#!/usr/bin/env bash
# The source distribution: what is in it, that it installs, and that its tests run.
source "$(dirname "$0")/common.sh"

environment "$work/env"
python=$work/env/bin/python
"$python" -m build --sdist --outdir "$work" "$work/source" > "$work/log" 2>&1 || fail "$(cat "$work/log")"
sdist=$(echo "$work"/fastvae-*.tar.gz)
rm -rf "$work/source"
size=$(wc -c < "$sdist")
[ "$size" -lt 1500000 ] || fail "$sdist has $size bytes"
! tar -t -f "$sdist" | grep -E "bench/results/|\.png$|\.whl$|\.so$" || fail "results, pictures or libraries in $sdist"

FASTVAE_REQUIRE_NATIVE=1 "$python" -m pip install --quiet --no-deps "$sdist"
check "$python" native
tar -x -C "$work/empty" -f "$sdist"
cd "$work"/empty/fastvae-*
FASTVAE_REQUIRE_NATIVE=1 "$python" -m pytest -q -n auto -p no:cacheprovider tests/ops/test_kl_gauss.py -k native
echo "$((size / 1024)) KiB"
