# Read by each script here: a clean copy of the sources, and how to make environments to install them in.
#
# PYTHON is the interpreter, TORCH what to install of PyTorch. Torch and what the tests need are installed once for each
# of them, in build/install/, and seen by the environments of all scripts through a .pth file; fastvae never is.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}
unset PYTHONPATH FASTVAE_REQUIRE_NATIVE FASTVAE_BACKEND FASTVAE_LIBRARY FASTVAE_CPU_ISA

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

mkdir "$work/source" "$work/empty"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | tar --null -T - -c) | tar -x -C "$work/source"

packages_of() { "$1" -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }

# environment FOLDER: a new one, with torch, and nothing of fastvae
environment() {
  local base
  base=$root/build/install/$("$PYTHON" -c 'import sys; print(f"python{sys.version_info[0]}.{sys.version_info[1]}")')-$TORCH
  if [ ! -e "$base/complete" ]; then
    "$PYTHON" -m venv --clear "$base"
    "$base/bin/python" -m pip install --quiet "$TORCH"
    "$base/bin/python" -m pip install --quiet numpy pytest pytest-xdist hypothesis scipy scikit-learn tqdm psutil build
    touch "$base/complete"
  fi
  "$PYTHON" -m venv "$1"
  packages_of "$base/bin/python" > "$(packages_of "$1/bin/python")/torch.pth"
}

# without_compilers COMMAND...: nothing on the PATH, and nothing said about compilers
without_compilers() { env -u CC -u CXX -u CMAKE_GENERATOR PATH=/nonexistent "$@"; }

# check PYTHON ARGUMENT...: see check.py; far from the sources
check() { (cd "$work/empty" && "$1" "$root/tests/install/check.py" "${@:2}"); }

fail() {
  echo "FAILED: $*"
  exit 1
}
