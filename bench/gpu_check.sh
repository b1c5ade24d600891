#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: bench/gpu_check.sh OUT [PYTHON]
#
# Installs into an environment of its own that sees the packages of PYTHON (python3 by default), from this source tree
# and without the network: torch, Triton, CMake, ninja, scikit-build-core, pytest and hypothesis must be there. Runs the
# tests on the GPU, then all GPU benchmarks. Leaves in OUT what they printed, gpu.json and gpu.md, also when cut short.
# Exits with 1 if the installation, a test or a check of determinism failed, or time ran out. Without a GPU it is a dry run in Triton's interpreter.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
base=${2:-python3}
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python=$environment/bin/python
status=0

echo "== installing" | tee "$out/install.txt"
{
  "$base" -m venv --without-pip "$environment"
  "$base" -c 'import sysconfig; print(sysconfig.get_path("purelib")); print(sysconfig.get_path("platlib"))' \
    > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
  timeout 120 "$base" -m pip --python "$python" install --quiet --no-index --no-build-isolation --no-deps --editable . \
    --config-settings=build-dir="$environment/build"
} >> "$out/install.txt" 2>&1 || { cat "$out/install.txt"; exit 1; }
if command -v nvcc > /dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
  # The CUDA kernels; where this fails, install.txt says why.
  timeout 240 cmake -DSOURCE="$PWD" -DOUTPUT="$out" -DVERSION=gpu-check -DWERROR=OFF -P kernels/cuda/build.cmake \
    >> "$out/install.txt" 2>&1
  [ -f "$out/libfastvae_cuda.so" ] && export FASTVAE_CUDA_LIBRARY=$out/libfastvae_cuda.so
fi
"$python" -m fastvae info | tee -a "$out/install.txt"

tests=(tests) budget=520 # seconds, for everything
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU: a dry run"
  export TRITON_INTERPRET=1 FASTVAE_BACKEND=triton TORCHDYNAMO_DISABLE=1
  tests=(tests/test_philox.py) budget=$((SECONDS + 240))
fi

echo "== testing"
workers=$("$python" -c 'import xdist' 2> /dev/null && echo "-n $(($(nproc) < 12 ? $(nproc) : 12))")
FASTVAE_BACKEND='' timeout 210 "$python" -m pytest -q -k "triton or cuda" $workers --junitxml="$out/tests.xml" "${tests[@]}" \
  > "$out/tests.txt" 2>&1 || status=1
tail -n 25 "$out/tests.txt"

echo "== measuring"
left=$((budget - SECONDS)) # of which a part that has begun may take the last minute
[ -n "${FASTVAE_CUDA_LIBRARY:-}" ] && left=$(((left - 90) / 2)) # for each of two tables, and the memory checks
left=$((left < 90 ? 90 : left))
timeout $left "$python" -m bench.gpu "$out" --seconds $((left - 60)) 2>&1 | tee "$out/bench.txt" || status=1

if [ -n "${FASTVAE_CUDA_LIBRARY:-}" ] && [ -z "${TRITON_INTERPRET:-}" ]; then
  echo "== the CUDA library: the same table, and its memory accesses"
  FASTVAE_BACKEND=cuda timeout $left "$python" -m bench.gpu "$out/cuda" --seconds $((left - 60)) 2>&1 | tee "$out/bench-cuda.txt"
  for tool in memcheck racecheck; do
    command -v compute-sanitizer > /dev/null || break
    timeout 45 compute-sanitizer --tool $tool --error-exitcode 7 "$python" -m pytest -q tests/test_cuda_kernels.py -k same_bits \
      > "$out/$tool.txt" 2>&1
    echo "$tool: exit status $?, $out/$tool.txt"
  done
fi
exit $status
