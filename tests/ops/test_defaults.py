"""Functions of data sets and of whole batches compute where their inputs are and in their dtype, whatever torch's
defaults; and take counts and numbers of other kinds."""

import functools
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NATIVE, REFERENCE, computing_on
from support.helpers import draw, tensors
from torch import Tensor, nn

import fastvae
from fastvae import VAE, GaussianMixture

S, D = 12, 3


def inputs() -> tuple[Tensor, ...]:
    """z, mu and logvar `[S, D]`, and probabilities."""
    mu, logvar = draw(S, D, seed=1).float(), draw(S, D, seed=2).float() - 1
    z = mu + (0.5 * logvar).exp() * draw(S, D, seed=3).float()
    return z, mu, logvar, z.softmax(1)


def fitted(z: Tensor, init: str, method: str = "fit") -> tuple[Tensor, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixture = getattr(GaussianMixture(3, init=init, seed=0, max_iter=5), method)(z)
    q = mixture.predict_proba(z)
    numbers = (mixture.score(z), mixture.bic(z), mixture.complete_log_likelihood(z), mixture.elbo(z, q))
    asked = (mixture.score_samples(z), mixture.predict(z), q, *mixture.sample(4, seed=1))
    return (
        mixture.weights_,
        mixture.means_,
        mixture.variances_,
        *asked,
        torch.tensor(numbers, dtype=torch.float64, device="cpu"),
    )


def model() -> VAE:
    """A VAE whose encoder gives the first two inputs for means."""
    return VAE(
        lambda x: (x[:, :2], x[:, 1:3] - 1), nn.Linear(2, 3), likelihood="gaussian", prior=fastvae.StandardNormal(2)
    ).eval()


CALLS: dict[str, Callable[..., Any]] = {
    "entropy": lambda z, mu, logvar, p: fastvae.entropy(p),
    "cross_entropy": lambda z, mu, logvar, p: fastvae.cross_entropy(p, p.flip(1)),
    "kl_discrete": lambda z, mu, logvar, p: fastvae.kl_discrete(p, p.flip(1)),
    "mi_bounds": lambda z, mu, logvar, p: fastvae.mi_bounds(p.mean(), 9 * p.mean(), dataset_size=S),
    "mmd": lambda z, mu, logvar, p: fastvae.mmd(z, mu),
    "agg_entropy": lambda z, mu, logvar, p: fastvae.agg_entropy(z, mu, logvar, dataset_size=60, estimator="mss"),
    "kl_decomposition": lambda z, mu, logvar, p: fastvae.kl_decomposition(z, mu, logvar, dataset_size=60)[:-1],
    "elbo": lambda z, mu, logvar, p: fastvae.elbo(z, mu, logvar),
    "iw_elbo": lambda z, mu, logvar, p: fastvae.iw_elbo(z, mu, logvar),
    "effective_sample_size": lambda z, mu, logvar, p: fastvae.effective_sample_size(z),
    "kl_decomposition_dataset": lambda z, mu, logvar, p: fastvae.kl_decomposition_dataset(
        (mu, logvar), n_samples=2, rows=5, batch_size=4
    )[:-1],
    "kl_decomposition_dataset, of an encoder": lambda z, mu, logvar, p: fastvae.kl_decomposition_dataset(
        lambda x: (x, 0 * x - 1), z.split(5), prior=None
    )[:-1],
    "active_units": lambda z, mu, logvar, p: fastvae.active_units((mu, logvar)),
    "prior_hole": lambda z, mu, logvar, p: (lambda h: (*h.terms[:-1], *h[1:]))(
        fastvae.prior_hole((mu, logvar), prior=fastvae.DiagonalGaussian(D), n_prior=8)
    ),
    "GaussianMixture": lambda z, mu, logvar, p: fitted(z, "kmeans++"),
    "GaussianMixture, random": lambda z, mu, logvar, p: fitted(z, "random"),
    "GaussianMixture, in batches": lambda z, mu, logvar, p: fitted(z, "kmeans++", "partial_fit"),
}


@pytest.fixture(params=[*REFERENCE, *list(NATIVE)[:1]])
def on_cpu(request: pytest.FixtureRequest) -> Iterator[None]:
    with computing_on({**REFERENCE, **NATIVE}[request.param]):
        yield


@pytest.mark.filterwarnings("ignore:mi:UserWarning")
@pytest.mark.parametrize("name", CALLS)
def test_another_default_device_changes_nothing(on_cpu: None, name: str) -> None:
    given = [x.cpu() for x in inputs()]
    expected = tensors(CALLS[name](*given))
    # Parameters of a module that a call makes are on the default device, and so is this prior's.
    with torch.device("cpu" if name == "prior_hole" else "meta"):
        got = tensors(CALLS[name](*given))
    for a, b in zip(got, expected, strict=True):
        assert (a.device.type, a.dtype) == ("cpu", b.dtype)
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:mi:UserWarning")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "prior_hole"])
def test_another_default_dtype_changes_nothing(on_cpu: None, name: str) -> None:
    given = inputs()
    expected = tensors(CALLS[name](*given))
    torch.set_default_dtype(torch.float64)
    try:
        got = tensors(CALLS[name](*given))
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_count_of_numpy_does_not_overflow() -> None:
    """N·M is beyond 32 bits."""
    own = torch.arange(4096)
    for estimator in fastvae.estimators.ESTIMATORS:
        got, expected = (
            fastvae.estimator_weights(estimator=estimator, n_columns=n(4096), dataset_size=n(1281167), own=own)
            for n in (np.int32, int)
        )
        assert got[0] == expected[0]
        assert got[2:] == expected[2:]
    huge = fastvae.estimator_weights(estimator="stratified", n_columns=4096, dataset_size=2**62, own=own)
    assert huge.log_w == pytest.approx(-np.log(4095))


@pytest.mark.filterwarnings("ignore:mi:UserWarning")
def test_numbers_of_other_kinds_are_pythons() -> None:
    z, mu, logvar, _ = inputs()
    i: Any = np.int64
    f: Any = Fraction
    decoded = functools.partial(fastvae.decoder_mutual_information, model(), proposal="prior")
    for left, right in (
        (fastvae.entropy(z.softmax(1), i(0)), fastvae.entropy(z.softmax(1), 0)),
        (fastvae.effective_sample_size(z, i(1)), fastvae.effective_sample_size(z, 1)),
        (fastvae.mmd(z, mu, f(3, 2)), fastvae.mmd(z, mu, 1.5)),
        (fastvae.active_units((mu, logvar), threshold=half) for half in (f(1, 2), 0.5)),
        (fastvae.mi_bounds(f(1, 2), 9, dataset_size=i(7)), fastvae.mi_bounds(0.5, 9, dataset_size=7)),
        (
            fastvae.kl_decomposition_dataset(
                (mu, logvar), n_samples=i(2), rows=np.uint8(5), batch_size=np.int16(4), seed=i(3)
            ),
            fastvae.kl_decomposition_dataset((mu, logvar), n_samples=2, rows=5, batch_size=4, seed=3),
        ),
        (
            fastvae.prior_hole((mu, logvar), n_prior=i(9), quantile=f(1, 4), n_dims=i(2), batch_size=i(5), seed=i(1)),
            fastvae.prior_hole((mu, logvar), n_prior=9, quantile=0.25, n_dims=2, batch_size=5, seed=1),
        ),
        (
            decoded(n_prior=i(4), n_importance=i(64), batch_size=i(100), seed=i(2)),
            decoded(n_prior=4, n_importance=64, batch_size=100, seed=2),
        ),
    ):
        for a, b in zip(tensors(left), tensors(right), strict=True):
            if isinstance(b, Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
            elif not isinstance(b, tuple):
                assert (a, type(a)) == (b, type(b))
