#!/usr/bin/env bash
# Everything that needs a GPU, in under nine minutes: bench/gpu_check.sh OUT [PYTHON]
#
# Installs into an environment of its own that sees the packages of PYTHON (python3 by default), from this source tree
# and without the network: torch, Triton, CMake, ninja, scikit-build-core, pytest and hypothesis must be there;
# pytest-xdist helps. Runs the tests of the Triton kernels on the GPU while nvcc, where there is one, builds the CUDA
# kernels; then the GPU benchmarks, and the same of the CUDA kernels. Each step has a limit. Leaves in OUT what they
# printed, as they print it, gpu.json and gpu.md, row by row. Exits with 1 if the installation, a test or a check of
# determinism failed, or time ran out. Without a GPU it is a dry run in Triton's interpreter.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
base=${2:-python3}
cd "$(dirname "$0")/.."
environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python=$environment/bin/python
export PYTHONUNBUFFERED=1
budget=520 # seconds, for everything
status=0

at_most() { # SECONDS, or what is left without the second number's: the smaller
  local left=$((budget - SECONDS - ${2:-0}))
  echo $(($1 < left ? $1 : left > 10 ? left : 10))
}

run_tests() { # NAME SECONDS EXPRESSION: all of it in OUT/NAME.txt, or OUT/NAME-FILE.txt where pytest-xdist is missing
  local limit=(timeout --signal=INT --kill-after=10 "$2") options=(-v -rfE --tb=short -p no:cacheprovider -k "$3")
  if "$python" -c 'import xdist' 2> /dev/null; then
    "${limit[@]}" "$python" -m pytest "${options[@]}" -n "$workers" "${tests[@]}" > "$out/$1.txt" 2>&1
  else # files instead of tests side by side; 5 is pytest's for none that the expression selects
    printf '%s\0' "${tests[@]}" | "${limit[@]}" xargs -0 -n 1 -P "$workers" bash -c '
      "${@:2:$#-2}" "${@: -1}" > "$1-$(basename "${@: -1}" .py).txt" 2>&1 || [ $? = 5 ]' - "$out/$1" \
      "$python" -m pytest "${options[@]}"
  fi || { status=1; echo "$1: a test failed, or $2 s were not enough"; }
  grep -hE '^(FAILED|ERROR)|^=+ .*(passed|failed|skipped|error)' "$out/$1"*.txt | tail -n 40
}

echo "== installing" | tee "$out/install.txt"
{
  "$base" -m venv --without-pip "$environment"
  "$base" -c 'import sysconfig; print(sysconfig.get_path("purelib")); print(sysconfig.get_path("platlib"))' \
    > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
  timeout 120 "$base" -m pip --python "$python" install --quiet --no-index --no-build-isolation --no-deps --editable . \
    --config-settings=build-dir="$environment/build"
} >> "$out/install.txt" 2>&1 || { cat "$out/install.txt"; exit 1; }
"$python" -m fastvae info | tee -a "$out/install.txt"

tests=(tests/test_cuda.py tests/test_triton.py tests/test_triton_early_exit.py tests/test_{agg_log_prob,every_op,precision}.py)
for file in tests/test_*.py; do # those that are about GPUs alone come first; test_triton_compile.py needs none
  [[ " ${tests[*]} tests/test_triton_compile.py " == *" $file "* ]] || tests+=("$file")
done
workers=$(($(nproc) < 12 ? $(nproc) : 12))
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU: a dry run"
  export TRITON_INTERPRET=1 FASTVAE_BACKEND=triton TORCHDYNAMO_DISABLE=1
  tests=(tests/test_philox.py) budget=$((SECONDS + 240))
elif command -v nvcc > /dev/null || [ -x /usr/local/cuda/bin/nvcc ]; then
  # The CUDA kernels, meanwhile; where this fails, nvcc.txt says why.
  timeout 200 cmake -DSOURCE="$PWD" -DOUTPUT="$out" -DVERSION=gpu-check -DWERROR=OFF -P kernels/cuda/build.cmake \
    > "$out/nvcc.txt" 2>&1 &
fi

echo "== testing"
compiled="test_every_op and (compile or transforms)" # these go through all backends themselves
FASTVAE_BACKEND='' run_tests tests "$(at_most 170)" "triton or test_cuda.py or $compiled"

wait # nothing else runs while times are taken
library=$out/libfastvae_cuda.so
[ -f "$library" ] && [ -z "${TRITON_INTERPRET:-}" ] || library=''

echo "== measuring"
limit=$(at_most 480 $((${#library} ? 140 : 0))) # the CUDA kernels' part
timeout "$limit" "$python" -m bench.gpu "$out" --seconds $((limit - 20)) 2>&1 | tee "$out/bench.txt" || status=1

if [ -n "$library" ]; then
  export FASTVAE_CUDA_LIBRARY=$library
  echo "== the CUDA kernels: their tests, the same table, and their memory accesses"
  FASTVAE_BACKEND='' run_tests tests-cuda "$(at_most 60)" "cuda and not triton and not test_cuda.py or $compiled"
  limit=$(at_most 120 30)
  FASTVAE_BACKEND=cuda timeout "$limit" "$python" -m bench.gpu "$out/cuda" --seconds $((limit - 15)) 2>&1 \
    | tee "$out/bench-cuda.txt"
  for tool in memcheck racecheck; do
    command -v compute-sanitizer > /dev/null || break
    timeout "$(at_most 45)" compute-sanitizer --tool $tool --error-exitcode 7 "$python" -m pytest -q \
      tests/test_cuda_kernels.py -k same_bits > "$out/$tool.txt" 2>&1
    echo "$tool: exit status $?, $out/$tool.txt"
  done
fi
echo "$SECONDS seconds, exit status $status"
exit $status
