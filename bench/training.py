"""A whole training step of a beta-TCVAE (Chen et al. 2018): a small MLP on 784 binary pixels, Adam."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvae

from .inputs import SEED
from .peers import LOG_2PI, compiled, reparameterize_formula

BETA, DATASET_SIZE, HIDDEN = 6.0, 60_000, 256


def model(D: int) -> fastvae.VAE:
    """A VAE with the same parameters each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * D), Halves())
        decoder = nn.Sequential(nn.Linear(D, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784))
    return fastvae.VAE(encoder, decoder, objective=fastvae.BetaTCVAE(beta=BETA, dataset_size=DATASET_SIZE))


class Halves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, -1)


def broadcast_loss(vae: fastvae.VAE, log_w: Tensor, x: Tensor, eps: Tensor) -> Tensor:
    """The public formula: log q(z_i|x_j) of every dimension as [B, B, D], and the log-weights [B, B]."""
    mu, logvar = vae.encoder(x)
    z = mu + eps * torch.exp(0.5 * logvar)
    nell = F.binary_cross_entropy_with_logits(vae.decoder(z), x, reduction="none").sum(-1).mean()
    pairs = -0.5 * ((z[:, None] - mu).square() * torch.exp(-logvar) + logvar + LOG_2PI)  # [B, B, D]
    log_qz = torch.logsumexp(log_w + pairs.sum(-1), 1)
    log_qz_d = torch.logsumexp(log_w[..., None] + pairs, 1)  # [B, D]
    log_qz_x = -0.5 * (eps.square() + logvar + LOG_2PI).sum(-1)
    log_pz_d = -0.5 * (z.square() + LOG_2PI)
    mi, tc = (log_qz_x - log_qz).mean(), (log_qz - log_qz_d.sum(-1)).mean()
    return nell + mi + BETA * tc + (log_qz_d - log_pz_d).sum(-1).mean()


def stratified(B: int) -> Tensor:
    """The log-weights [B, B] of a batch from a data set of N: 1/N on the diagonal, (N − 1) / (N (B − 1)) elsewhere."""
    N = DATASET_SIZE
    return torch.full((B, B), math.log((N - 1) / (N * (B - 1)))).fill_diagonal_(-math.log(N))


class Step:
    """x [B, 784] to the loss and every parameter's gradient, the parameters moved on.

    loss: of the VAE and x. draw: (mu, logvar) to z, how the loss samples.
    """

    def __init__(self, D: int, loss: Callable[[fastvae.VAE, Tensor], Tensor], draw: Callable[..., Tensor]):
        self.D, self.loss, self.draw = D, loss, draw
        self.vae = model(D)
        self.optimizer = torch.optim.Adam(self.vae.parameters())

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        self.optimizer.zero_grad()
        loss = self.loss(self.vae, x)
        loss.backward()
        self.optimizer.step()
        gradients: list[Any] = [p.grad for p in self.vae.parameters()]
        return loss.detach(), *gradients

    def hidden(self, x: Tensor) -> tuple[Tensor, ...]:
        """The noise [B, D] that a call would draw now, and the parameters that it would start from."""
        zeros = torch.zeros(len(x), self.D)
        return self.draw(zeros, zeros), *(p.detach().clone() for p in self.vae.parameters())


def contestants(B: int, D: int) -> dict[str, Step]:
    log_w = stratified(B)

    def ours(vae: fastvae.VAE, x: Tensor) -> Tensor:
        return vae(x).loss

    def drawing(loss: Callable[..., Tensor]) -> Callable[[fastvae.VAE, Tensor], Tensor]:
        return lambda vae, x: loss(vae, log_w, x, torch.randn(B, D))

    return {
        "fastvae": Step(D, ours, fastvae.reparameterize),
        "fastvae_compiled": Step(D, compiled(ours), fastvae.reparameterize),
        "eager_broadcast": Step(D, drawing(broadcast_loss), reparameterize_formula),
        "compiled_broadcast": Step(D, drawing(compiled(broadcast_loss)), reparameterize_formula),
    }


def truth(x: Tensor, eps: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """The loss and the gradients, by the broadcast formula, in the dtype of x."""
    vae = model(eps.shape[1]).to(x.dtype)
    with torch.no_grad():
        for own, given in zip(vae.parameters(), parameters, strict=True):
            own.copy_(given)
    loss = broadcast_loss(vae, stratified(len(x)).to(x.dtype), x, eps)
    return loss.detach(), *torch.autograd.grad(loss, list(vae.parameters()))
