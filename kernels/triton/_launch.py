"""What the launchers share: how rows are handed to a kernel, and the accumulation dtypes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastvae.backends.contract import accumulation_dtype

# Whether kernels run in Triton's interpreter, on tensors of any device: decided when Triton is first imported.
INTERPRETED: bool = triton.knobs.runtime.interpret


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype that a kernel on tensors of this dtype computes in, as a `tl.constexpr` parameter."""
    return tl.float64 if accumulation_dtype(dtype) == torch.float64 else tl.float32


def rows(x: Tensor, n_rows: int) -> tuple[Tensor, int]:
    """x [n_rows, D], or [1, D] that serves all rows, with contiguous rows; and its row stride, 0 for the latter."""
    (n, D), (row, column) = x.shape, x.stride()
    if column != 1 and D > 1:
        x = x.contiguous()
        row = D
    return x, 0 if n == 1 != n_rows else row
