"""Fused kernels for variational autoencoders."""

from importlib import import_module
from typing import Any

from .aggregate import estimators
from .aggregate.dataset import kl_decomposition_dataset
from .aggregate.decomposition import KLDecomposition, kl_decomposition
from .aggregate.estimators import agg_entropy, estimator_weights
from .aggregate.marginals import AggregateLogProb, agg_log_prob_marginals
from .aggregate.mmd import mmd
from .backends.use import precision, use, use_backend
from .evaluation.active_units import active_units
from .evaluation.holes import PriorHole, prior_hole
from .evaluation.mutual_information import DecoderMI, MIBounds, decoder_mutual_information, mi_bounds
from .mixtures import em
from .mixtures.gaussian_mixture import GaussianMixture
from .models import bounds, likelihoods, objectives, priors
from .models.aggregate_objectives import BetaTCVAE, InfoVAE
from .models.bounds import effective_sample_size, elbo, iw_elbo, mc_iw_elbo
from .models.mixture_priors import MixturePrior, VampPrior
from .models.objectives import ELBO, IWAE
from .models.priors import DiagonalGaussian, StandardNormal
from .models.vae import VAE, LogLikelihood, VAEOutput
from .ops.agg_log_prob import agg_log_prob
from .ops.categorical import cross_entropy, entropy, kl_discrete
from .ops.cross_log_prob import cross_log_prob, log_prob_gauss
from .ops.kl_gauss import kl_gauss
from .ops.pairs import ColumnWeights
from .ops.sample_gauss import GaussianSample, reparameterize, sample_gauss
from .protocols import Draws, Likelihood, Objective, Prior

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "IWAE",
    "VAE",
    "AggregateLogProb",
    "BetaTCVAE",
    "ColumnWeights",
    "DecoderMI",
    "DiagonalGaussian",
    "Draws",
    "GaussianMixture",
    "GaussianSample",
    "InfoVAE",
    "KLDecomposition",
    "Likelihood",
    "LogLikelihood",
    "MIBounds",
    "MixturePrior",
    "Objective",
    "Prior",
    "PriorHole",
    "StandardNormal",
    "VAEOutput",
    "VampPrior",
    "active_units",
    "agg_entropy",
    "agg_log_prob",
    "agg_log_prob_marginals",
    "bounds",
    "cross_entropy",
    "cross_log_prob",
    "decoder_mutual_information",
    "effective_sample_size",
    "elbo",
    "em",
    "entropy",
    "estimator_weights",
    "estimators",
    "iw_elbo",
    "kl_decomposition",
    "kl_decomposition_dataset",
    "kl_discrete",
    "kl_gauss",
    "likelihoods",
    "log_prob_gauss",
    "mc_iw_elbo",
    "mi_bounds",
    "mmd",
    "objectives",
    "precision",
    "prior_hole",
    "priors",
    "reparameterize",
    "sample_gauss",
    "use",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """`fastvae.plots`, imported when it is asked for, as it needs matplotlib."""
    if name != "plots":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_module(".evaluation.plots", __name__)
