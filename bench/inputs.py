"""Inputs as a trained VAE gives them: means about N(0, 1), logvar about −2. Plain torch, on the device asked for: no
backend of fastvae has a part in what it is measured on."""

import torch
from torch import Tensor

SEED = 0


def posteriors(B: int, D: int, seed: int = SEED, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """mu, logvar [B, D]"""
    generator = torch.Generator(device).manual_seed(seed)
    mu = torch.randn(B, D, generator=generator, device=device)
    return mu, -2 + 0.5 * torch.randn(B, D, generator=generator, device=device)


def samples(mu: Tensor, logvar: Tensor, seed: int = SEED) -> Tensor:
    """z [B, D], each from its own posterior"""
    generator = torch.Generator(mu.device).manual_seed(seed + 1)
    eps = torch.randn(mu.shape, generator=generator, device=mu.device)
    return mu + eps * torch.exp(0.5 * logvar)


def samples_and_posteriors(B: int, D: int, seed: int = SEED, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    """z, mu, logvar [B, D], each z from its own posterior"""
    mu, logvar = posteriors(B, D, seed, device)
    return samples(mu, logvar, seed), mu, logvar


def population(
    N: int, D: int, seed: int = SEED, device: str = "cpu", *, active: int, logvar: float
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mu, logvar [N, D], each z from its own posterior. In so many dimensions, which are drawn, logvar is about the
    value given; in the others all posteriors are nearly N(0, I)."""
    generator = torch.Generator(device).manual_seed(seed)
    inactive = torch.randperm(D, generator=generator, device=device)[active:]
    mu = torch.randn(N, D, generator=generator, device=device)
    widths = torch.full((N, D), float(logvar), device=device)
    mu[:, inactive] *= 0.01
    widths[:, inactive] = 0
    widths += 0.1 * torch.randn(N, D, generator=generator, device=device)
    return samples(mu, widths, seed), mu, widths


def binary_images(B: int, D: int, seed: int = SEED, device: str = "cpu") -> tuple[Tensor]:
    """x [B, 784] in {0, 1}, as many ones as in handwritten digits; D, the number of latents, is the model's."""
    generator = torch.Generator(device).manual_seed(seed)
    return ((torch.rand(B, 784, generator=generator, device=device) < 0.13).float(),)
