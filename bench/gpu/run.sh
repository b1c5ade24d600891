#!/usr/bin/env bash
# What needs a GPU: bench/gpu/run.sh PART OUT, PART one of sanity, measure, profile, tests, peers; or all, one by one.
#
# Runs from the source tree, without installing anything: torch with Triton, pytest, pytest-xdist and hypothesis must be
# there. The library of CUDA kernels is FASTVAE_CUDA_LIBRARY, or build/gpu/libfastvae_cuda.so, or else is built there.
# Every step has a limit of its own, and so has the part; the first three parts take up to 330 s, and so do the others,
# but for that build. After every step all there is is in OUT/PART.tar.gz, and nothing else is left in OUT. Prints at most
# 48 lines, at the end; exits with 1 where anything failed or is missing. FASTVAE_COMMIT names the commit where there is
# no history, PYTHON the interpreter; FASTVAE_TRIAL=1 is a rehearsal at tiny sizes.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
usage='usage: bench/gpu/run.sh sanity|measure|profile|tests|peers|all OUT'
part=${1:?$usage}
: "${2:?$usage}"
declare -A limits=([sanity]=95 [measure]=165 [profile]=65 [tests]=245 [peers]=85 [all]=0)
[ -n "${limits[$part]:-}" ] || { echo "no part $part; $usage" >&2; exit 1; }
out=$(cd "$OLDPWD" && mkdir -p "$2" && cd "$2" && pwd) || exit 1
if [ "$part" = all ]; then
  status=0
  for each in sanity measure profile tests peers; do bench/gpu/run.sh $each "$out" || status=1; done
  exit $status
fi
budget=${FASTVAE_BUDGET:-${limits[$part]}} # seconds
work=$(mktemp -d)
# A process that has been forked and is not yet what it will be has these too.
trap '[ $BASHPID != $$ ] || rm -rf "$work"' EXIT
trap '[ $BASHPID = $$ ] || exit 1; status=1; echo INTERRUPTED >> "$work/steps"; stop; finish' TERM INT HUP
python=${PYTHON:-python3} status=0
: > "$work/steps"
export PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD PYTHONUNBUFFERED=1
export FASTVAE_COMMIT=${FASTVAE_COMMIT:-$(git describe --always --dirty 2> /dev/null)}
export PYTORCH_NVML_BASED_CUDA_CHECK=1 # whether there is a GPU is asked without a context, which a fork could not have
trial=${FASTVAE_TRIAL:-}
wants=() # what the next step's output must say
[ "$part" = sanity ] || tar -C "$work" -xzf "$out/sanity.tar.gz" ./sanity.json 2> /dev/null # what hangs is not tried

archive() { # renamed when it is whole
  tar -C "$work" -czf "$out/.$part.new" . && mv "$out/.$part.new" "$out/$part.tar.gz"
}

finish() { # the summary, what failed first, and the exit status
  trap '' TERM INT HUP
  local failed='^(FAILED|ERROR|WRONG|HANG|FAULT)' found=(/dev/null)
  mapfile -t -O 1 found < <(ls -tr "$work"/*.summary 2> /dev/null)
  {
    echo "== $part: $SECONDS s, exit status $status"
    cat "$work/steps"
    grep -hE "$failed" "${found[@]}" | awk 'NR <= 16 { print } END { if (NR > 16) print NR - 16 " more failed" }'
    grep -hvE "$failed" "${found[@]}"
  } | cut -c 1-200 | head -n 48 > "$work/summary.txt"
  archive
  cat "$work/summary.txt"
  exit $status
}

stop() {
  local pid
  for pid in $(jobs -pr); do # of timeout, which passes it on, and kills what does not heed it
    kill "$pid"
    wait "$pid" 2> /dev/null # bash's "Killed"
    kill -KILL -- "-$pid" 2> /dev/null
  done
}

step() { # NAME SECONDS COMMAND...: in the background, as only a wait can be interrupted; $grace s to end after them
  local name=$1 limit=$2 left=$((budget - SECONDS + free)) begin=$SECONDS how=ok code=0 want
  shift 2
  limit=$((limit < left ? limit : left))
  if ((limit < 2)); then
    how='NOT STARTED, out of time'
  else
    # An interrupt, so that pytest says what it has; it is ignored in the background, unless set back.
    FASTVAE_UNTIL=$(($(date +%s) + limit)) timeout --signal=INT --kill-after="${grace:-3}" "$limit" env --default-signal=INT "$@" \
      > "$work/$name.txt" 2>&1 &
    wait $! 2> /dev/null || code=$?
    kill -KILL -- "-$!" 2> /dev/null # what is left of its processes, as kernels that hang keep the GPU
    case $code in
      0)
        for want in "${wants[@]}"; do
          grep -qE "$want" "$work/$name.txt" || how="FAILED: no '$want', $(tail -n 1 "$work/$name.txt" | cut -c 1-120)"
        done
        ;;
      124 | 137) how='TIMED OUT' ;;
      *) how="FAILED ($code): $(tail -n 1 "$work/$name.txt" | cut -c 1-120)" ;;
    esac
  fi
  wants=()
  [ "$how" = ok ] || status=1
  echo "$name: $((SECONDS - begin)) s, $how" >> "$work/steps"
  archive
}

build() { # FOLDER [OPTION...]: the CUDA library, for the machine's own GPU
  mkdir -p "$1" && rm -f "$1/libfastvae_cuda.so"
  cmake -DSOURCE="$PWD" -DOUTPUT="$1" -DVERSION="${FASTVAE_COMMIT:-unknown}" -DWERROR=OFF "${@:2}" \
    -DARCHITECTURES="$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')" \
    -P kernels/cuda/build.cmake
  [ -f "$1/libfastvae_cuda.so" ] || { cat "$1/libfastvae_cuda.txt"; return 1; }
}
export -f build
export python built=${FASTVAE_GPU_BUILD:-$PWD/build/gpu}

free=0 # seconds that are not the part's
if [ -z "${FASTVAE_CUDA_LIBRARY:-}" ]; then
  export FASTVAE_CUDA_LIBRARY=$built/libfastvae_cuda.so
  if [ ! -f "$FASTVAE_CUDA_LIBRARY" ]; then
    free=200
    step build 200 bash -c 'build "$built"'
    free=$SECONDS
  fi
fi

case $part in
  sanity)
    step machine 40 bash -c 'nvidia-smi; nvcc --version; ncu --version; $python -m fastvae info'
    step sanity 75 "$python" -m bench.gpu.sanity "$work"
    if grep -qE '^(HANG|FAULT|WRONG).* on cuda' "$work/sanity.summary"; then
      [ -f "$built/nobulk/libfastvae_cuda.so" ] || step build-nobulk 100 bash -c 'build "$built/nobulk" -DBULK=0'
      FASTVAE_CUDA_LIBRARY=$built/nobulk/libfastvae_cuda.so \
        step sanity-nobulk 50 "$python" -m bench.gpu.sanity "$work" --no-bulk
      cat "$work/mended.txt" >> "$work/steps" 2> /dev/null # so that it is not cut off
    fi
    ;;
  measure)
    step checks 60 "$python" -m bench.gpu.measure checks "$work"
    step table 100 "$python" -m bench.gpu.measure table "$work"
    step small 40 "$python" -m bench.gpu.measure small "$work"
    ;;
  profile)
    step ncu-triton 35 "$python" -m bench.gpu.profile triton "$work"
    step ncu-cuda 35 "$python" -m bench.gpu.profile cuda "$work"
    ;;
  tests)
    alone=tests/backends/test_on_gpu.py
    workers=$(($(nproc) - 2 < 14 ? $(nproc) - 2 : 14)) # none where there are two cores
    files=(tests/ops/test_*.py tests/backends/test_{on_gpu,triton,precision}.py)
    chosen='(on_gpu or cuda or triton) and not inductor and not more_elements' # inductor runs a compiler of C++
    large=(more_elements_than_32_bits_count more_elements_of_columns_than_32_bits_count)
    # One that is short stands for the large ones in a rehearsal.
    [ -z "$trial" ] || files=("$alone") chosen='test_cuda_graph and kl_gauss' large=(a_graph_draws_anew_at_each_replay) workers=2
    pytest=("$python" -m pytest -v -rfEs --tb=short -p no:cacheprovider)
    export FASTVAE_HYPOTHESIS=gpu FASTVAE_BACKEND='' FASTVAE_REQUIRE_GPU=1
    grace=12 step pytest 110 "${pytest[@]}" -n $workers -k "$chosen" "${files[@]}"
    for tool in memcheck racecheck; do # without the cache of memory each tensor has bounds of its own
      wants=('^every op has run$' 'ERROR SUMMARY: 0 errors') limit=35 options=(--report-api-errors no)
      [ $tool = memcheck ] || wants[1]='RACECHECK SUMMARY: 0 hazards' limit=40 options=()
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 step $tool $limit \
        compute-sanitizer --tool $tool --error-exitcode 7 "${options[@]}" "$python" -m bench.gpu.sanity --here
    done
    for name in "${large[@]}"; do # most of the memory, so alone
      wants=('[^0-9]2 passed') # on both backends
      grace=12 step "$name" 30 "${pytest[@]}" "$alone::test_$name"
    done
    { # where its own summary is missing, what it said before
      grep -hE '^(FAILED|ERROR|SKIPPED .*room)|^=+ .*(passed|failed|skipped|error).* in [0-9]' "$work"/*.txt
      sed -nE 's/^\[gw[0-9]+\].* (FAILED|ERROR) /\1 /p' "$work"/*.txt
    } | awk '!/^(FAILED|ERROR)/ || !seen[$1, $2]++' > "$work/pytest.summary"
    ;;
  peers) step peers 85 "$python" -m bench.gpu.measure peers "$work" ;;
esac
finish
