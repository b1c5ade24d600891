"""Inputs as a trained VAE gives them: means about N(0, 1), logvar about −2."""

import torch
from torch import Tensor

import fastvae

SEED = 0


def posteriors(B: int, D: int) -> tuple[Tensor, Tensor]:
    """mu, logvar [B, D]"""
    generator = torch.Generator().manual_seed(SEED)
    mu = torch.randn(B, D, generator=generator)
    return mu, -2 + 0.5 * torch.randn(B, D, generator=generator)


def samples_and_posteriors(B: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, mu, logvar [B, D], each z from its own posterior"""
    mu, logvar = posteriors(B, D)
    return fastvae.reparameterize(mu, logvar, seed=SEED), mu, logvar
