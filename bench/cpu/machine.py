"""The machine: what it is, and its ceilings, measured by a small native probe (probe.cpp)."""

import ctypes
import importlib.metadata
import os
import platform
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch

from fastvae import backends
from fastvae.backends import native_library

from ..harness import Ceilings

HERE = Path(__file__).parent
VERSIONS = ("torch", "numpy", "pykeops", "scikit-learn")


OF_THE_LIMITS = Ceilings(fma=116e9, exponentials=11.6e9, bandwidth=30.6e9)  # results/amd-epyc-2-threads


def slowness(found: Ceilings) -> float:
    """The factor by which a machine is slower than the one for which the limits in seconds were chosen, in what it is
    worst at; 1 on a faster one."""
    return max(1.0, *(theirs / ours for theirs, ours in zip(OF_THE_LIMITS, found, strict=True)))


def why_not(backend: str, device: str = "cpu") -> str:
    """The reason why another backend would compute what is called fastvae here; empty where it is this one."""
    try:
        computes = backends.name_for(torch.device(device))
    except RuntimeError as error:
        return str(error)
    if computes == backend:
        return ""
    available, detail = backends.status(backend)[1:]
    reason = "FASTVAE_BACKEND or use_backend asks for it" if available else detail
    return f"fastvae is measured on its backend {backend}, but {computes} would compute: {reason}"


def ceilings(threads: int, repeats: int = 5) -> Ceilings:
    """Measures the ceilings now, by a probe compiled for this machine: the best of some repeats."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "probe.so"
        flags = "-std=c++20 -O3 -march=native -ffp-contract=fast -fno-math-errno -w -shared -fPIC"
        kernels = HERE.parents[1] / "kernels"
        include = [f"-I{kernels / folder}" for folder in ("cpu", "include")]
        subprocess.run(
            [
                *shlex.split(os.environ.get("CXX", "c++")),
                *flags.split(),
                *include,
                str(HERE / "probe.cpp"),
                "-o",
                str(library),
                "-lpthread",
            ],
            check=True,
        )
        probe = ctypes.CDLL(str(library))
        rates = (probe.fma_rate, probe.exp_rate, probe.copy_rate)
        for rate in rates:
            rate.restype = ctypes.c_double
        return Ceilings(*(max(rate(threads) for _ in range(repeats)) for rate in rates))


def describe() -> dict[str, object]:
    """Describes where and with what something was measured, without the name of the host."""
    import cpuinfo  # these two are not needed, and perhaps not there, where a GPU is measured
    import psutil

    return {
        "cpu": cpuinfo.get_cpu_info().get("brand_raw") or platform.processor(),
        "threads": torch.get_num_threads(),
        "memory": psutil.virtual_memory().total,
        "python": platform.python_version(),
        "fastvae": native_library.status()[1],
        "versions": {name: importlib.metadata.version(name) for name in VERSIONS if _installed(name)},
    }


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
