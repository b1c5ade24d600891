"""Entropy, cross-entropy and KL of categorical distributions: against scipy, at zeros, and their gradients."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import special

from fastvae import cross_entropy, entropy, kl_discrete


def categorical(*shape, seed=0, sharpness=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(shape, dtype=torch.float64, generator=generator)).softmax(-1)


@given(st.integers(1, 40), st.integers(0, 10_000), st.floats(0.1, 60.0))
def test_values_are_scipys_and_obey_their_identities(categories, seed, sharpness):
    p, q = (categorical(3, categories, seed=s, sharpness=sharpness) for s in (seed, seed + 1))
    torch.testing.assert_close(entropy(p), torch.from_numpy(special.entr(p.numpy())).sum(-1))
    torch.testing.assert_close(kl_discrete(p, q), torch.from_numpy(special.rel_entr(p.numpy(), q.numpy())).sum(-1))
    torch.testing.assert_close(cross_entropy(p, q), entropy(p) + kl_discrete(p, q))
    assert (entropy(p) <= math.log(categories) + 1e-12).all()
    assert (kl_discrete(p, q) >= -1e-12).all()
    torch.testing.assert_close(kl_discrete(p, p), torch.zeros(3, dtype=torch.float64))


def test_a_fair_coin_is_the_most_uncertain():
    p = torch.linspace(0, 1, 11, dtype=torch.float64)
    values = entropy(torch.stack((p, 1 - p)), dim=0)
    assert values.argmax() == 5
    torch.testing.assert_close(values[[0, 5, 10]], torch.tensor([0.0, math.log(2), 0.0], dtype=torch.float64))


def test_zero_probabilities():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    q = torch.tensor([[0.25, 0.75, 0.0], [0.5, 0.5, 0.0]], requires_grad=True)
    expected = torch.tensor([0.5 * math.log(4 / 3), math.log(2)])
    torch.testing.assert_close(kl_discrete(p, q), expected)
    torch.testing.assert_close(entropy(p), torch.tensor([math.log(2), 0.0]))
    total = entropy(p) + cross_entropy(p, q) + kl_discrete(p, q)
    assert all(g.isfinite().all() for g in torch.autograd.grad(total.sum(), (p, q)))
    impossible = torch.tensor([0.0, 0.5, 0.5])
    assert kl_discrete(p, impossible).tolist() == [math.inf, math.inf]
    assert cross_entropy(p, impossible).tolist() == [math.inf, math.inf]


def test_a_softmax_that_underflows_has_finite_gradients():
    logits = torch.tensor([0.0, 1.0, -1e4], requires_grad=True)
    p = logits.softmax(0)
    assert p[2] == 0
    (gradient,) = torch.autograd.grad(entropy(p) + kl_discrete(p, torch.tensor([0.5, 0.25, 0.25])), logits)
    assert gradient.isfinite().all()


def test_gradients():
    p, q = categorical(2, 5).requires_grad_(), categorical(2, 5, seed=1).requires_grad_()
    for function in (lambda p, q: entropy(p), cross_entropy, kl_discrete):
        assert torch.autograd.gradcheck(function, (p, q))


def test_shapes_broadcast_and_halves_accumulate_in_float32():
    p, q = categorical(4, 3).bfloat16(), categorical(3, seed=1).bfloat16()
    value = kl_discrete(p, q)
    assert value.shape == (4,)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, kl_discrete(p.float(), q.float()))
    assert cross_entropy(categorical(3, 4), categorical(3, 4), dim=0).shape == (4,)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda: entropy(torch.tensor([1, 0])), TypeError, "p"),
        (lambda: entropy([0.5, 0.5]), TypeError, "p"),
        (lambda: kl_discrete(torch.ones(2) / 2, torch.tensor([0, 1])), TypeError, "q"),
        (lambda: cross_entropy(torch.ones(2) / 2, torch.ones(3) / 3), ValueError, "p, q"),
    ],
)
def test_errors_name_the_argument(call, error, name):
    with pytest.raises(error, match=rf"^{name}: "):
        call()
