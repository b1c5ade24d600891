"""Counter-based standard normals: Philox4x32-10 (Salmon et al. 2011) and Box–Muller, in plain torch.

Element e of a sample depends on the seed and on e alone: key = the 64-bit seed, counter = (low, high word of
e // 4, stream, 0). The words (w0, w1) give elements 0 and 1 of each group of four, (w2, w3) elements 2 and 3.
"""

import math

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def _multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """(high, low) 32-bit words of constant * x; x holds 32-bit words in int64."""
    high = ((constant >> 16) * x + (((constant & 0xFFFF) * x) >> 16)) >> 16
    low = (constant * x) & _WORD  # the product wraps modulo 2^64, its low word stands
    return high, low


def philox4x32(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds on four counter words and two key words, all 32-bit words in int64 tensors."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def standard_normal(seed: Tensor, first: int, count: int) -> Tensor:
    """Elements first .. first + count of the seed's stream of normals, `[count]` float64 on the seed's device."""
    group = torch.arange(first // 4, (first + count + 3) // 4, dtype=torch.int64, device=seed.device)
    zero = torch.zeros_like(group)
    w0, w1, w2, w3 = philox4x32(
        (group & _WORD, (group >> 32) & _WORD, zero, zero), (seed & _WORD, (seed >> 32) & _WORD)
    )
    u1 = ((torch.stack((w0, w2), -1) >> 8) + 1).double() * 2.0**-24  # in (0, 1], exact
    u2 = (torch.stack((w1, w3), -1) >> 8).double() * 2.0**-24  # in [0, 1), exact
    radius = torch.sqrt(-2 * torch.log(u1))
    angle = 2 * math.pi * u2
    normals = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), -1)  # [groups, 2, 2]
    return normals.flatten()[first % 4 :][:count]
