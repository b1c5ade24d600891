"""Tools, and the CUDA kernels built to run on the host (kernels/cuda/host_simt.h), where there is no GPU."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "host_simt"
LIBRARY = BUILD / "libfastvae_cuda.so"


def tool(name: str) -> str:
    """The path of a program: of the environment that runs the tests if that has it, else the machine's."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name) or name


def needed(name: str) -> str:
    """The path of a program; where there is none, the test is skipped."""
    return shutil.which(tool(name)) or pytest.skip(f"no {name}")


def build(target: Path = BUILD, *options: str) -> None:
    """Brings the library up to date: half a minute the first time, then no time."""
    commands = [[tool("ninja"), "-C", str(target)]]
    if not (target / "build.ninja").exists():
        configure = [tool("cmake"), "-S", str(ROOT), "-B", str(target), "-G", "Ninja", "-DFASTVAE_CUDA=HOST"]
        commands.insert(0, [*configure, f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", *options])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the CUDA kernels for the host: {' '.join(command)}\n{done.stdout}{done.stderr}")
