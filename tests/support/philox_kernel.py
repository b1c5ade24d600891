"""The words of the Triton generator, for test_philox.py: a kernel must stand in a file of its own."""

import torch
import triton
import triton.language as tl
from fastvae.kernels.triton.philox import philox
from torch import Tensor


@triton.jit
def _words(groups, seed, out, n: tl.constexpr):
    i = tl.arange(0, n)
    w0, w1, w2, w3 = philox(tl.load(groups + i), tl.load(seed))
    for k in tl.static_range(4):
        word = w0 if k == 0 else w1 if k == 1 else w2 if k == 2 else w3
        tl.store(out + 4 * i + k, word.to(tl.int64))


def words(groups: Tensor, seed: Tensor) -> Tensor:
    """groups [n] int64, n a power of 2; [n, 4]"""
    out = torch.empty(len(groups), 4, dtype=torch.int64, device=groups.device)
    _words[(1,)](groups, seed, out, len(groups))
    return out
