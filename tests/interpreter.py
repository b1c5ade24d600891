"""Triton's interpreter, made to round as GPUs do, and kept to what it can finish.

It computes a kernel program by program in numpy, some hundred microseconds for each operation of each program. So a
test that launches more than `MOST_PROGRAMS` is skipped: at most sizes that is the largest of them, and every kernel
has smaller ones that no block size divides.
"""

import math
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

MOST_PROGRAMS = 96

_cast = InterpreterBuilder.cast_impl
_run = GridExecutor.__call__
_patch_language = interpreter._patch_lang


def _cast_impl(self: InterpreterBuilder, source: TensorHandle, to: Any) -> TensorHandle:
    """bfloat16 to and from anything by way of float32, rounded to nearest even; the original truncates."""
    if source.dtype.scalar == tl.bfloat16 != to.scalar:
        wide = (source.data.astype(np.uint32) << 16).view(np.float32)
        return _cast(self, TensorHandle(wide, tl.float32), to)
    if to.scalar == tl.bfloat16 != source.dtype.scalar:
        single = np.ascontiguousarray(source.data.astype(np.float32))
        bits = single.view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return TensorHandle(np.where(np.isnan(single), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)
    return _cast(self, source, to)


def _create_fma(self: InterpreterBuilder, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
    """Fused in float32: float64 holds the product exactly. The original rounds it."""
    if z.dtype.scalar != tl.float32:
        return TensorHandle(x.data * y.data + z.data, z.dtype.scalar)
    exact = x.data.astype(np.float64) * y.data + z.data
    return TensorHandle(exact.astype(np.float32), tl.float32)


def _call(self: GridExecutor, *arguments: Any, **keywords: Any) -> None:
    if not callable(self.grid) and math.prod(self.grid) > MOST_PROGRAMS:
        pytest.skip(f"{math.prod(self.grid)} programs: more than {MOST_PROGRAMS} are too slow in Triton's interpreter")
    _patched.clear()
    with np.errstate(all="ignore"):
        _run(self, *arguments, **keywords)


_patched: set[tuple[bool, bool]] = set()


def _patch_lang(function: Any) -> Any:
    """Once in a launch for each way to import the language. The original does it at each call of a device function,
    half a millisecond every time."""
    modules = list(function.__globals__.values())
    key = (any(m is tl for m in modules), any(m is tl.core for m in modules))
    if key in _patched:
        return interpreter._LangPatchScope()
    _patched.add(key)
    return _patch_language(function)


def adjust() -> None:
    """For the whole process."""
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_fma = _create_fma
    GridExecutor.__call__ = _call
    interpreter._patch_lang = _patch_lang
