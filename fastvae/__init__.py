"""Fused kernels for variational autoencoders."""

from .aggregate_objectives import BetaTCVAE, InfoVAE
from .backends import use_backend
from .backends.precision import precision
from .decomposition import KLDecomposition, kl_decomposition
from .divergences import mmd
from .estimators import agg_entropy, estimator_weights
from .evaluate import DecoderMI, active_units, decoder_mutual_information, kl_decomposition_dataset
from .holes import PriorHole, prior_hole
from .importance import effective_sample_size, elbo, iw_elbo, mc_iw_elbo
from .information import cross_entropy, entropy, kl_discrete, mi_bounds
from .mixture import GaussianMixture
from .mixture_priors import MixturePrior, VampPrior
from .objectives import ELBO, IWAE
from .ops.aggregate import agg_log_prob, agg_log_prob_marginals
from .ops.cross import cross_log_prob, log_prob_gauss
from .ops.kl import kl_gauss
from .ops.pairs import ColumnWeights
from .ops.sampling import GaussianSample, reparameterize, sample_gauss
from .priors import DiagonalGaussian, StandardNormal
from .vae import VAE, LogLikelihood, VAEOutput

__version__ = "0.1.0"

__all__ = [
    "ELBO",
    "IWAE",
    "VAE",
    "BetaTCVAE",
    "ColumnWeights",
    "DecoderMI",
    "DiagonalGaussian",
    "GaussianMixture",
    "GaussianSample",
    "InfoVAE",
    "KLDecomposition",
    "LogLikelihood",
    "MixturePrior",
    "PriorHole",
    "StandardNormal",
    "VAEOutput",
    "VampPrior",
    "active_units",
    "agg_entropy",
    "agg_log_prob",
    "agg_log_prob_marginals",
    "cross_entropy",
    "cross_log_prob",
    "decoder_mutual_information",
    "effective_sample_size",
    "elbo",
    "entropy",
    "estimator_weights",
    "iw_elbo",
    "kl_decomposition",
    "kl_decomposition_dataset",
    "kl_discrete",
    "kl_gauss",
    "log_prob_gauss",
    "mc_iw_elbo",
    "mi_bounds",
    "mmd",
    "precision",
    "prior_hole",
    "reparameterize",
    "sample_gauss",
    "use_backend",
]
