"""Inputs as a trained VAE gives them: means about N(0, 1), logvar about −2."""

import torch
from torch import Tensor

import fastvae

SEED = 0


def posteriors(B: int, D: int, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """mu, logvar [B, D]"""
    generator = torch.Generator().manual_seed(seed)
    mu = torch.randn(B, D, generator=generator)
    return mu, -2 + 0.5 * torch.randn(B, D, generator=generator)


def samples_and_posteriors(B: int, D: int, seed: int = SEED) -> tuple[Tensor, Tensor, Tensor]:
    """z, mu, logvar [B, D], each z from its own posterior"""
    mu, logvar = posteriors(B, D, seed)
    return fastvae.reparameterize(mu, logvar, seed=seed), mu, logvar


def binary_images(B: int, D: int, seed: int = SEED) -> tuple[Tensor]:
    """x [B, 784] in {0, 1}, as many ones as in handwritten digits; D, the number of latents, is the model's."""
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(B, 784, generator=generator) < 0.13).float(),)
