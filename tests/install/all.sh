#!/usr/bin/env bash
# all.sh [CASE...]: the cases of this folder, or those named, one after another, and a table of them. Ten minutes.
cd "$(dirname "$0")"
cases=("compiler.sh g++-11 tests" "compiler.sh g++-12" "compiler.sh clang++-14" "compiler.sh clang++-16"
  "compiler.sh clang++-19 tests" no_compiler.sh wheel.sh sdist.sh mingw.sh)
[ $# = 0 ] || cases=("$@")
log=$(mktemp)
trap 'rm -f "$log"' EXIT
table=()
failed=0
for case in "${cases[@]}"; do
  echo "== $case"
  start=$SECONDS
  if bash -c "bash $case" > "$log" 2>&1; then result=passed; else result=FAILED failed=1; fi
  tail -12 "$log"
  table+=("$(printf '%-32s %s, %d s: %s' "$case" "$result" $((SECONDS - start)) "$(grep -v '^$' "$log" | tail -1)")")
done
printf '\n'
printf '%s\n' "${table[@]}"
exit $failed
