"""Adapts Triton's interpreter: it rounds as GPUs do, checks addresses, skips what it cannot finish, and is faster.

It computes a kernel program by program in numpy, some ten microseconds for each operation of each program. So a
test that launches more than `MOST_PROGRAMS` is skipped: at most sizes that is the largest of them, and every kernel
has smaller ones that no block size divides.

Most of its time goes into describing types and shapes, in the same words again and again, and into patching the
language at each launch; the second half of this file remembers the descriptions and patches once. The numbers are
the same.
"""

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton._C.libtriton.ir import INPUT_PRECISION
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

MOST_PROGRAMS = 96

_cast = InterpreterBuilder.cast_impl
_dot = InterpreterBuilder.create_dot
_load = InterpreterBuilder.create_masked_load
_store = InterpreterBuilder.create_masked_store
_run = GridExecutor.__call__
_patch_language = interpreter._patch_lang
_np_dtype = interpreter._get_np_dtype
_block_type = core.block_type.__init__
_unwrap = core._unwrap_if_constexpr
_broadcast = TritonSemantic.broadcast_impl_value
_cast_semantic = TritonSemantic.cast


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


def _tf32(x: np.ndarray) -> np.ndarray:
    """float32 rounded to 11 bits, halves away from 0, as `cvt.rna.tf32` rounds; in float64, where products are exact"""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32).astype(np.float64)


def _towards_zero(x: np.ndarray) -> np.ndarray:
    """float64 to float32"""
    near = x.astype(np.float32)
    return np.where(np.abs(near) > np.abs(x), np.nextafter(near, np.float32(0)), near)


def _create_dot(
    self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, d: TensorHandle, precision: Any, *rest: Any
) -> TensorHandle:
    """tf32x3 as tensor cores compute it at worst: three products of rounded numbers, and each step of 8 terms rounded
    towards zero. The original is exact."""
    if precision != INPUT_PRECISION.TF32x3:
        return _dot(self, a, b, d, precision, *rest)
    big_a, big_b = _tf32(a.data), _tf32(b.data)
    small_a, small_b = _tf32(a.data - big_a), _tf32(b.data - big_b)
    total = d.data
    for left, right in ((small_a, big_b), (big_a, small_b), (big_a, big_b)):
        for k in range(0, a.data.shape[1], 8):
            total = _towards_zero(total + left[:, k : k + 8] @ right[k : k + 8])
    return TensorHandle(total, tl.float32)


def _call(self: GridExecutor, *arguments: Any, **keywords: Any) -> None:
    if not callable(self.grid) and math.prod(self.grid) > MOST_PROGRAMS:
        pytest.skip(f"{math.prod(self.grid)} programs: more than {MOST_PROGRAMS} are too slow in Triton's interpreter")
    _memory[:] = [_extent(x) for x in (*arguments, *keywords.values()) if isinstance(x, torch.Tensor) and x.numel()]
    with np.errstate(all="ignore"):
        _run(self, *arguments, **keywords)


# No kernel reads or writes what is not its own: on a GPU that would go unseen most of the time.

_memory: list[tuple[int, int]] = []  # the addresses of the tensors that a kernel was launched with


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """The first byte, and the one after the last."""
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def _check(pointers: TensorHandle, mask: TensorHandle) -> None:
    addresses = pointers.data if mask.data.all() else pointers.data[mask.data.astype(bool)]
    if addresses.size == 0:
        return
    first, end = int(addresses.min()), int(addresses.max()) + pointers.get_element_ty().primitive_bitwidth // 8
    if not any(begin <= first and end <= until for begin, until in _memory):
        raise IndexError(f"a kernel looked at [{first:#x}, {end:#x}), which is in none of its tensors")


def _create_masked_load(
    self: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, *rest: Any
) -> TensorHandle:
    _check(pointers, mask)
    return _load(self, pointers, mask, *rest)


def _create_masked_store(
    self: InterpreterBuilder, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any
) -> Any:
    _check(pointers, mask)
    return _store(self, pointers, value, mask, *rest)


# Faster: what is described and patched again and again is remembered.

_patched: set[int | tuple[bool, bool]] = set()
_shapes: dict[tuple[int, ...], tuple[tl.tuple, tl.constexpr]] = {}
_blocks: dict[tuple[str, tuple[int, ...]], tuple[tl.tuple, int, str]] = {}
_WIDE = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


class _Stays:
    """A patch of the language that is not undone after a launch, as the whole process is in the interpreter."""

    def restore(self) -> None:
        pass


def _patch_lang(function: Any) -> _Stays:
    """Patches the language, once for each way to import it."""
    names = function.__globals__
    if id(names) not in _patched:
        _patched.add(id(names))
        modules = list(names.values())
        key = (any(m is tl for m in modules), any(m is core for m in modules))
        if key not in _patched:
            _patched.add(key)
            _patch_language(function)
            core.tensor.__index__ = _index
    return _Stays()


def _index(self: Any) -> int:
    """The number in an array of one element: Triton 3.6 relies on numpy for it, and numpy 2.4 raises an error."""
    return int(self.handle.data.item())


@functools.cache
def _dtype_named(name: str) -> np.dtype:
    return _np_dtype(tl.dtype(name))


def _get_np_dtype(dtype: Any) -> np.dtype:
    scalar = dtype.scalar
    return np.dtype(np.uint64) if isinstance(scalar, tl.pointer_type) else _dtype_named(scalar.name)


def _block_type_init(self: Any, element_ty: Any, shape: Any) -> None:
    key = (element_ty.name, tuple(getattr(s, "value", s) for s in shape))
    if key not in _blocks:
        _block_type(self, element_ty, shape)
        _blocks[key] = self.shape, self.numel, self.name
    self.element_ty = element_ty
    self.shape, self.numel, self.name = _blocks[key]


def _tensor_init(self: Any, handle: TensorHandle, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    key = tuple(type.shape) if type.is_block() else ()
    if key not in _shapes:
        _shapes[key] = tl.tuple([tl.constexpr(s) for s in key]), tl.constexpr(math.prod(key))
    self.shape, self.numel = _shapes[key]


def _broadcast_impl_value(self: Any, left: Any, right: Any) -> tuple[Any, Any]:
    if left.shape is right.shape:
        return left, right
    if len(left.shape) != len(right.shape):
        return _broadcast(self, left, right)
    a, b = left.type.shape.values, right.type.shape.values
    shape = [n if m == 1 else m for m, n in zip(a, b, strict=True)]
    return left if a == shape else _widened(left, shape), right if b == shape else _widened(right, shape)


def _widened(x: Any, shape: list[int]) -> Any:
    data = np.broadcast_to(x.handle.data, shape)
    return tl.tensor(TensorHandle(data, x.dtype), tl.block_type(x.dtype, shape))


def _unwrap_if_constexpr(x: Any) -> Any:
    return x.value if x.__class__ is tl.constexpr else _unwrap(x) if isinstance(x, (list, tuple, tl.tuple)) else x


def _cast_to(self: Any, x: Any, to: Any, *rounding: Any) -> Any:
    return x if x.dtype is to.scalar else _cast_semantic(self, x, to, *rounding)


def _sanitize(self: Any, left: Any, right: Any, operation: Any) -> None:
    """Raises an OverflowError where an int32 overflowed."""
    dtype = left.dtype
    if dtype.int_bitwidth < 64:
        wide = _WIDE[operation.__name__](left.handle.data, right.handle.data, dtype=np.int64)
        least, most = dtype.get_int_min_value(), dtype.get_int_max_value()
        if wide.min() < least or wide.max() > most:
            raise OverflowError(f"{dtype} in {operation.__name__}")


def adjust() -> None:
    """Adapts the interpreter for the whole process."""
    InterpreterBuilder.cast_impl = _cast_impl
    InterpreterBuilder.create_fma = _create_fma
    InterpreterBuilder.create_dot = _create_dot
    InterpreterBuilder.create_masked_load = _create_masked_load
    InterpreterBuilder.create_masked_store = _create_masked_store
    GridExecutor.__call__ = _call
    interpreter._patch_lang = _patch_lang
    interpreter._get_np_dtype = _get_np_dtype
    core._unwrap_if_constexpr = _unwrap_if_constexpr
    core.block_type.__init__ = _block_type_init
    core.tensor.__init__ = _tensor_init
    TritonSemantic.broadcast_impl_value = _broadcast_impl_value
    TritonSemantic.cast = _cast_to
    TritonSemantic.binary_op_sanitize_overflow_impl = _sanitize
