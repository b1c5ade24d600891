"""Fused kernels for variational autoencoders."""

from .backends import use_backend
from .estimators import KLDecomposition, agg_entropy, estimator_weights, kl_decomposition
from .objectives import ELBO
from .ops.aggregate import (
    ColumnWeights,
    agg_log_prob,
    agg_log_prob_marginals,
    cross_log_prob,
    log_prob_gauss,
)
from .ops.kl import kl_gauss
from .ops.sampling import GaussianSample, reparameterize, sample_gauss
from .priors import StandardNormal
from .vae import VAE, VAEOutput

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "VAE",
    "ColumnWeights",
    "GaussianSample",
    "KLDecomposition",
    "StandardNormal",
    "VAEOutput",
    "agg_entropy",
    "agg_log_prob",
    "agg_log_prob_marginals",
    "cross_log_prob",
    "estimator_weights",
    "kl_decomposition",
    "kl_gauss",
    "log_prob_gauss",
    "reparameterize",
    "sample_gauss",
    "use_backend",
]
