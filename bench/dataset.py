"""The KL's terms over a whole data set: fastvae's function, and the peers of the marginals, some rows at a time."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastvae

from . import peers
from .accuracy import ROWS
from .inputs import SEED, posteriors


def drawn(B: int, D: int, seed: int = SEED, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """Posteriors [B, D], and the z that `ours` draws from them."""
    mu, logvar = posteriors(B, D, seed, device)
    return fastvae.reparameterize(mu, logvar, seed=SEED), mu, logvar


def ours(z: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a few thousand posteriors this wide do not say how much z knows of x
        terms = fastvae.kl_decomposition_dataset((mu, logvar), rows=torch.arange(len(z)), seed=SEED)
    return terms.mi, terms.tc, terms.dim_kl


def peer(marginals: peers.Marginals) -> Callable[..., Any]:
    return functools.partial(peers.decomposition, marginals)


def contestants(B: int, D: int) -> dict[str, Callable[..., Any] | str]:
    return {
        "fastvae": ours,
        "eager_broadcast": peer(peers.marginals_broadcast),
        "compiled_marginals": peer(peers.compiled_marginals),
        "keops": peer(peers.marginals_keops),
        "torch_distributions": peer(peers.marginals_distributions),
        "sklearn_gmm": "gives the joint only",
    }


def first_rows(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda z, *posteriors: function(z[:ROWS], *posteriors)
