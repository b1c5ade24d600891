"""Entropy, cross-entropy and KL of categorical distributions: against scipy, at zeros, and their gradients; and the
bounds of I(x; z)."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Target
from hypothesis import given
from hypothesis import strategies as st
from scipy import special
from support.helpers import wrong
from torch import nn

import fastvae
from fastvae import cross_entropy, effective_sample_size, entropy, kl_decomposition, kl_discrete, mi_bounds
from fastvae.models.likelihoods import Bernoulli, Gaussian


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
        (lambda: entropy(wrong([0.5, 0.5])), TypeError, "p"),
        (lambda: kl_discrete(torch.ones(2) / 2, torch.tensor([0, 1])), TypeError, "q"),
        (lambda: cross_entropy(torch.ones(2) / 2, torch.ones(3) / 3), ValueError, "p, q"),
        *(
            (lambda function=function, dim=dim: function(dim), error, "dim")
            for function in (
                lambda dim: entropy(torch.ones(2, 2) / 2, dim),
                lambda dim: cross_entropy(torch.ones(2, 2) / 2, torch.ones(2) / 2, dim),
                lambda dim: kl_discrete(torch.ones(2, 2) / 2, torch.ones(2) / 2, dim),
                lambda dim: effective_sample_size(torch.ones(2, 2), dim),
            )
            for dim, error in (
                (2, ValueError),
                (-3, ValueError),
                (2**70, ValueError),
                (None, TypeError),
                (0.0, TypeError),
            )
        ),
    ],
)
def test_errors_name_the_argument(call, error, name):
    with pytest.raises(error, match=rf"^{name}: "):
        call()


# mi_bounds


def test_bounds() -> None:
    assert mi_bounds(3.0, 7.0, h_data=9.0) == fastvae.MIBounds(lower=6.0, upper=7.0) == (6.0, 7.0)
    assert mi_bounds(3.0, 7.0, dataset_size=1000) == (math.log(1000) - 3.0, 7.0)
    assert mi_bounds(3.0, 7.0, dataset_size=1000, likelihood=Bernoulli()) == (math.log(1000) - 3.0, 7.0)
    for density in ("density", Gaussian()):
        assert mi_bounds(-3.0, 7.0, h_data=-9.0, likelihood=density) == (-6.0, 7.0)
        with pytest.raises(ValueError, match=r"^h_data: expected the differential entropy"):
            mi_bounds(-3.0, 7.0, dataset_size=1000, likelihood=density)
    lower, upper = mi_bounds(torch.tensor(3.0), torch.tensor(7.0), dataset_size=1000)
    assert (lower, upper) == (pytest.approx(math.log(1000) - 3.0), 7.0)
    with pytest.warns(UserWarning, match="cross") as caught:
        mi_bounds(0.1, 2.0, h_data=9.0)  # a mean over pixels
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize(
    ("error", "named", "changed"),
    [
        (ValueError, "h_data", {"dataset_size": None}),
        (ValueError, "dataset_size", {"dataset_size": 0}),
        (TypeError, "dataset_size", {"dataset_size": 10.0}),
        (TypeError, "nell", {"nell": None}),
        (TypeError, "div", {"div": torch.zeros(2)}),
        (ValueError, "nell", {"nell": math.nan}),
        (ValueError, "nell", {"nell": torch.tensor(math.nan)}),
        (ValueError, "div", {"div": torch.tensor([math.nan])}),
        (TypeError, "div", {"div": torch.tensor(True)}),
        (ValueError, "nell", {"nell": -0.1}),
        (ValueError, "nell", {"nell": torch.tensor(-0.1), "likelihood": Bernoulli()}),
        (ValueError, "h_data", {"h_data": math.inf, "dataset_size": None}),
        (ValueError, "h_data", {"h_data": torch.tensor(-math.inf), "dataset_size": None}),
        (ValueError, "h_data", {"h_data": math.nan, "dataset_size": None}),
        (ValueError, "dataset_size", {"h_data": 3.0}),
        (TypeError, "h_data", {"h_data": "9"}),
        (ValueError, "nell", {"nell": torch.zeros((), device="meta")}),
        (ValueError, "div", {"div": 10**400}),
        (TypeError, "div", {"div": torch.zeros(1).to_sparse()}),
        (TypeError, "likelihood", {"likelihood": np.array(["discrete", "density"])}),
        (ValueError, "likelihood", {"likelihood": "gaussian"}),
        (TypeError, "likelihood", {"likelihood": nn.Identity()}),
    ],
)
def test_errors_of_the_bounds(error: type[Exception], named: str, changed: dict[str, Any]) -> None:
    with pytest.raises(error, match=rf"^{named}: expected"):
        mi_bounds(**{"nell": 1.0, "div": 2.0, "dataset_size": 5, **changed})


def test_bounds_hold_the_mi_of_a_model(backend: Target) -> None:
    """A channel with known I_enc: z = the bit x plus noise, decoded by the true posterior p(x|z) at q(z)."""
    s, n = 0.6, 200_000
    x = torch.arange(2.0).double()
    mu, logvar = 2 * x[:, None] - 1, torch.full((2, 1), 2 * math.log(s)).double()
    z = fastvae.reparameterize(mu, logvar, n, seed=0)  # [n, 2, 1]
    logits = 2 * z[..., 0] / s**2
    nell = -Bernoulli().log_prob(x.to(z), logits).mean()
    mi = kl_decomposition(z, mu, logvar).mi
    lower, upper = map(torch.as_tensor, mi_bounds(nell, fastvae.kl_gauss(mu, logvar), dataset_size=2))
    assert lower.item() == pytest.approx(mi.item(), abs=1e-9)  # tight: the decoder inverts the encoder
    assert mi < upper
    assert mi_bounds(-Bernoulli().log_prob(x.to(z), logits / 2).mean(), upper, dataset_size=2)[0] < mi - 0.01
