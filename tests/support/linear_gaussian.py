"""A model with log p(x) and p(z|x) in closed form: x = W z + b + s · noise, z ~ N(0, I), the columns of W orthogonal,
so that p(z|x) is a diagonal Gaussian."""

import math

import torch
from torch import Tensor
from torch import distributions as dist


class LinearGaussian:
    """n dimensions of x, D of z, all float64; W and b are leaves that want gradients."""

    def __init__(self, n: int = 6, D: int = 3, s2: float = 0.3):
        generator = torch.Generator().manual_seed(7)
        columns, _ = torch.linalg.qr(torch.randn(n, D, dtype=torch.float64, generator=generator))
        self.W = (columns * torch.linspace(0.5, 3.0, D, dtype=torch.float64)).requires_grad_()
        self.b = torch.randn(n, dtype=torch.float64, generator=generator).requires_grad_()
        self.s2 = s2

    def draw(self, B: int, seed: int = 0) -> Tensor:
        """x `[B, n]`, from the model."""
        generator = torch.Generator().manual_seed(seed)
        n, D = self.W.shape
        z, noise = (torch.randn(B, size, dtype=torch.float64, generator=generator) for size in (D, n))
        return self.decode(z).detach() + math.sqrt(self.s2) * noise

    def decode(self, z: Tensor) -> Tensor:
        """E[x|z]"""
        return z @ self.W.T + self.b

    def log_px_z(self, x: Tensor, z: Tensor) -> Tensor:
        return -0.5 * ((x - self.decode(z)) ** 2 / self.s2 + math.log(2 * math.pi * self.s2)).sum(-1)

    def log_px(self, x: Tensor) -> Tensor:
        covariance = self.W @ self.W.T + self.s2 * torch.eye(len(self.b), dtype=torch.float64)
        return dist.MultivariateNormal(self.b, covariance).log_prob(x).detach()

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """mu and logvar of p(z|x), `[B, D]` each."""
        precision = 1 + self.W.square().sum(0) / self.s2
        mu = (x - self.b) @ self.W / self.s2 / precision
        return mu.detach(), -precision.log().expand_as(mu).detach()
