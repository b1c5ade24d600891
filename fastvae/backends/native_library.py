"""The C++ library for CPUs, loaded through ctypes, and the instruction set that it computes with."""

import ctypes
import functools
import sys
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int64
from typing import Any

import torch  # first, because the library looks for torch's OpenMP runtime when it loads

from . import c_interface as c
from . import installed, interruption
from .settings import WrongSetting, setting

LIBRARY = "libfastvae_cpu" + {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


class Kernels(ctypes.Structure):
    """The table of kernels of one instruction set and dtype."""

    _fields_ = [
        (name, ctypes.CFUNCTYPE(c_int, *parameters, c_int))  # the last one: threads
        for name, parameters in c.KERNELS.items()
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The shared library, loaded once; `FASTVAE_LIBRARY` names another build of it, for the sanitizers."""
    lib = c.load(LIBRARY, "FASTVAE_LIBRARY", "fastvae_interface", installed.build_command)
    lib.fastvae_version.restype = c_char_p
    lib.fastvae_instruction_sets.restype = c_char_p
    lib.fastvae_kernels_for.restype = POINTER(Kernels)
    lib.fastvae_kernels_for.argtypes = (c_char_p, c_int)
    lib.fastvae_take_visits.restype = None
    lib.fastvae_take_visits.argtypes = (POINTER(c_int64), POINTER(c_int64))
    interruption.watch(lib)
    return lib


def instruction_sets() -> list[str]:
    """The instruction sets compiled in that this CPU can run, best first."""
    return library().fastvae_instruction_sets().decode().split()


@functools.cache
def kernels_for(instruction_set: str, dtype: torch.dtype) -> Any:
    return library().fastvae_kernels_for(instruction_set.encode(), int(dtype == torch.float64)).contents


_instruction_set: str | None = None
_told: list[Callable[[tuple[Any, Any]], object]] = []  # who is told of the tables that are in use


def use_instruction_set(name: str | None) -> None:
    """Compute with one instruction set, or with the best (None); `FASTVAE_CPU_ISA` sets it from outside."""
    global _instruction_set
    available = instruction_sets()
    if name is not None and name not in available:
        raise ValueError(f"instruction set: expected one of {', '.join(available)}, got {name!r}")
    _instruction_set = name or available[0]
    kernels.cache_clear()
    for tell in _told:
        tell(_tables())


def when_chosen(tell: Callable[[tuple[Any, Any]], object]) -> None:
    """Call a function with the tables of float32 and float64, now and whenever others are chosen."""
    tell(_tables())
    _told.append(tell)


def _tables() -> tuple[Any, Any]:
    return kernels(torch.float32), kernels(torch.float64)


def instruction_set() -> str:
    """The instruction set in use."""
    if _instruction_set is None:
        asked = setting("FASTVAE_CPU_ISA")
        if asked is not None and asked not in instruction_sets():
            offered = ", ".join(instruction_sets()) or "none of its own"
            raise WrongSetting(f"FASTVAE_CPU_ISA={asked}: of this library the CPU can run {offered}")
        use_instruction_set(asked)
    return str(_instruction_set)


@functools.cache
def kernels(dtype: torch.dtype) -> Any:
    return kernels_for(instruction_set(), dtype)


@functools.cache
def missing() -> str:
    """The reason why there is no library to call; empty where there is one."""
    try:
        library()
    except (OSError, AttributeError) as error:
        return f"{LIBRARY}: {error}"
    return ""


@functools.cache
def status() -> tuple[bool, str]:
    """Whether the library loads and this CPU can run it; what it runs on, or why not."""
    asked = setting("FASTVAE_CPU_ISA")
    if missing():
        if asked:
            raise WrongSetting(f"FASTVAE_CPU_ISA={asked}: there is no library that has it: {missing()}")
        return False, missing()
    if not (asked or instruction_sets()):
        return False, "this CPU has none of the instruction sets that the library was built for"
    return True, f"{LIBRARY} {library().fastvae_version().decode()}, {instruction_set()}"


def take_visits() -> tuple[int, int]:
    """The number of dimensions of pairs that `agg_log_prob` and its backward visited since this was last called, and
    the number that there were: S·N·D for each pass over all pairs. A backward makes two passes, the first of which adds
    the rows up again."""
    visited, everything = c_int64(), c_int64()
    library().fastvae_take_visits(visited, everything)
    return visited.value, everything.value
