"""The noise: Philox4x32-10 and Box-Muller, the same on every backend."""

import math

import pytest
import scipy.stats
import torch
from conftest import TRITON, Target, computing_on
from support.helpers import DTYPES, normals

import fastvae
from fastvae.backends import philox

SEEDS = (0, 1, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1, -1, 0x243F6A8885A308D3)
WORD = 2**32


def philox_in_integers(counter: list[int], key: list[int]) -> list[int]:
    """Salmon et al. 2011, in Python's own integers."""
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], WORD)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], WORD)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % WORD, (key[1] + 0xBB67AE85) % WORD]
    return counter


def normal_in_integers(seed: int, element: int) -> float:
    """Element `element` of the stream, as docs/architecture.md spells it under "Random numbers"."""
    group, place = divmod(element, 4)
    words = philox_in_integers([group % WORD, group // WORD, 0, 0], [seed % WORD, (seed // WORD) % WORD])
    w0, w1 = words[:2] if place < 2 else words[2:]
    u1, u2 = ((w0 >> 8) + 1) / 2**24, (w1 >> 8) / 2**24
    return math.sqrt(-2 * math.log(u1)) * (math.cos, math.sin)[place % 2](2 * math.pi * u2)


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        (0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (WORD - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_known_answers(word: int, answer: tuple[int, ...]) -> None:
    words = torch.full((6,), word)
    assert tuple(int(w) for w in philox.philox4x32(tuple(words[:4]), tuple(words[4:]))) == answer
    assert tuple(philox_in_integers([word] * 4, [word] * 2)) == answer


def test_known_answers_of_the_triton_kernel() -> None:
    """The Triton kernel's known answers, and its words for any counter and key, by Python's own integers."""
    triton_philox = pytest.importorskip("philox_kernel")
    groups = [0, 1, 2, WORD - 1, WORD, WORD + 1, 2**40 + 5, 2**62 - 1]
    with computing_on(next(iter(TRITON.values()))) as target:
        for seed in SEEDS:
            key = torch.tensor((seed + 2**63) % 2**64 - 2**63, device=target.device)
            words = triton_philox.words(torch.tensor(groups, device=target.device), key).tolist()
            for group, got in zip(groups, words, strict=True):
                counter = [group % WORD, group // WORD, 0, 0]
                assert got == philox_in_integers(counter, [seed % WORD, (seed // WORD) % WORD])
            if seed == 0:
                assert words[0] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_stretch_of_the_stream(seed: int) -> None:
    """Any stretch of the stream, also past 2^34 elements, where the counter's high word begins to count."""
    as_int64 = torch.tensor((seed + 2**63) % 2**64 - 2**63)
    for first in (0, 1, 2, 3, 5, 4 * WORD - 3, 2**40 + 1):
        stretch = philox.standard_normal(as_int64, first, 11).tolist()
        assert stretch == pytest.approx([normal_in_integers(seed, first + e) for e in range(11)], abs=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_every_backend_draws_the_same_normals(backend: Target, seed: int, dtype: torch.dtype) -> None:
    z = normals(1, 1271, dtype=dtype, seed=seed)
    expected = [normal_in_integers(seed, e) for e in range(1271)]
    torch.testing.assert_close(z[0].double(), torch.tensor(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_element_depends_on_the_seed_and_its_index_alone(backend: Target, dtype: torch.dtype) -> None:
    count = 40_000  # several blocks of any kernel
    stream = normals(1, count, dtype=dtype, seed=9).flatten()
    for L, B, D in (
        (1, count, 1),
        (8, 50, 100),
        (5, 1, 8000),
        (count, 1, 1),
        (3, 97, 123),
        (7, 1271, 3),
        (1, 3, 1),
    ):
        z = normals(L, B, D, dtype=dtype, seed=9).flatten()
        assert torch.equal(z, stream[: z.numel()]), (L, B, D)


def test_distribution(backend: Target) -> None:
    n = 200_000
    z = normals(1, n // 100, 100, dtype=torch.float32, seed=2024).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((z**power).mean().item() - moment) < 4 * math.sqrt(variance / n)
    assert scipy.stats.kstest(z.flatten().numpy(force=True), "norm").pvalue > 1e-3
    pairs = z.flatten()
    for lag in (1, 2, 4, 100):
        assert abs((pairs[lag:] * pairs[:-lag]).mean().item()) < 4 / math.sqrt(n)


def test_different_seeds_are_unrelated(backend: Target) -> None:
    one, two = (normals(1, 20_000, dtype=torch.float32, seed=s).flatten() for s in (1, 2))
    assert abs((one * two).mean().item()) < 4 / math.sqrt(20_000)


def test_gradients_see_the_noise_of_the_forward(backend: Target) -> None:
    """The backward draws the noise again: dz / dlogvar at sigma = 1 is eps / 2, bit for bit."""
    mu, logvar = torch.zeros(97, 33), torch.zeros(97, 33, requires_grad=True)
    z = fastvae.reparameterize(mu, logvar, seed=4)
    (gradient,) = torch.autograd.grad(z.sum(), logvar)
    assert torch.equal(gradient, z.detach() / 2)


def test_the_interpreter_sees_a_kernel_that_leaves_its_tensors() -> None:
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU's kernels are not interpreted")
    from support import philox_kernel

    groups, seed, out = torch.arange(8), torch.tensor(1), torch.empty(8, 4, dtype=torch.int64)
    philox_kernel._words[(1,)](groups, seed, out, 8)
    with pytest.raises(Exception, match="in none of its tensors"):
        philox_kernel._words[(1,)](groups[:7], seed, out, 8)
    with pytest.raises(Exception, match="in none of its tensors"):
        philox_kernel._words[(1,)](groups, seed, out[:7], 8)
