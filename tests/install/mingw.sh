#!/usr/bin/env bash
# libfastvae_cpu.dll by a cross-compiler (Debian's g++-mingw-w64-x86-64-posix): what it exports and needs, and its
# kernels, threads included, under Wine (Debian's wine and wine64) where that is installed; CI=true asks for it.
source "$(dirname "$0")/common.sh"
target=x86_64-w64-mingw32

environment "$work/env"
"$work/env/bin/python" -m pip install --quiet cmake ninja
PATH=$work/env/bin:$PATH
cmake -S "$work/source" -B "$work/build" -G Ninja -DFASTVAE_WERROR=ON -DFASTVAE_THREADS_TEST=ON \
  -DCMAKE_SYSTEM_NAME=Windows -DCMAKE_SYSTEM_PROCESSOR=AMD64 -DCMAKE_CXX_COMPILER=$target-g++-posix > "$work/log" ||
  fail "$(cat "$work/log")"
cmake --build "$work/build" > "$work/log" || fail "$(cat "$work/log")"
cmake --install "$work/build" --prefix "$work/installed" > "$work/log"

library=$work/installed/fastvae/libfastvae_cpu.dll
$target-objdump -p "$library" > "$work/log"
needed=$(sed -n 's/.*DLL Name: //p' "$work/log" | tr '[:upper:]' '[:lower:]' | sort | xargs)
exported=$(sed -n 's/.*\] \(fastvae_[a-z_]*\)$/\1/p' "$work/log" | sort | xargs)
[ "$needed" = "kernel32.dll msvcrt.dll" ] || fail "needs $needed"
[ "$exported" = "fastvae_instruction_sets fastvae_interface fastvae_kernels_for fastvae_poll fastvae_take_visits fastvae_version" ] ||
  fail "exports $exported"

if command -v wine > /dev/null; then
  cd "$work/build"
  WINEDEBUG=-all WINEPREFIX=$work/wine wine ./fastvae_threads.exe
else
  [ -z "${CI:-}" ] || fail "no Wine here"
  echo "compiled, not run: no Wine here"
fi
