"""Whole training steps, of an ELBO and of a beta-TCVAE (Chen et al. 2018): a small MLP on 784 binary pixels, Adam."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastvae

from .inputs import SEED
from .peers import LOG_2PI, compiled, kl_formula, reparameterize_formula

BETA, DATASET_SIZE, HIDDEN = 6.0, 60_000, 256


def model(D: int, objective: fastvae.Objective | None = None) -> fastvae.VAE:
    """A VAE with the same parameters each time; without an objective, it is the ELBO."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = nn.Sequential(nn.Linear(784, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 2 * D), Halves())
        decoder = nn.Sequential(nn.Linear(D, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 784))
    return fastvae.VAE(encoder, decoder, objective=objective)


class Halves(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, -1)


# The formulas that people write: of a VAE, x [B, 784] and the noise [B, D].


def drawn(vae: fastvae.VAE, x: Tensor, eps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The negative log-likelihood, over the batch, and z, mu and logvar [B, D]."""
    mu, logvar = vae.encoder(x)
    z = mu + eps * torch.exp(0.5 * logvar)
    nell = F.binary_cross_entropy_with_logits(vae.decoder(z), x, reduction="none").sum(-1).mean()
    return nell, z, mu, logvar


def elbo_loss(vae: fastvae.VAE, x: Tensor, eps: Tensor) -> Tensor:
    nell, _, mu, logvar = drawn(vae, x, eps)
    return nell + kl_formula(mu, logvar)


def broadcast_loss(vae: fastvae.VAE, x: Tensor, eps: Tensor, log_w: Tensor) -> Tensor:
    """log q(z_i|x_j) of every dimension as [B, B, D], and the log-weights [B, B]."""
    nell, z, mu, logvar = drawn(vae, x, eps)
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


# The steps.


class Step:
    """x [B, 784] to the loss and every parameter's gradient, the parameters moved on.

    loss: of the VAE and x. draw: (mu, logvar) to z, how the loss samples.
    """

    def __init__(self, vae: fastvae.VAE, D: int, loss: Callable[..., Tensor], draw: Callable[..., Tensor]):
        self.vae, self.D, self.loss, self.draw = vae, D, loss, draw
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


class Training(NamedTuple):
    """What is trained.

    objective: fastvae's, or None, its default. formula: the same, of a VAE, x, the noise, and what `weights` gives for
    B examples. means: by which the formula computes, as its contestants' names end.
    """

    objective: fastvae.Objective | None
    formula: Callable[..., Tensor]
    weights: Callable[[int], tuple[Tensor, ...]] = lambda B: ()
    means: str = ""

    def contestants(self, B: int, D: int) -> dict[str, Step]:
        weights = self.weights(B)

        def ours(vae: fastvae.VAE, x: Tensor) -> Tensor:
            return vae(x).loss

        def drawing(formula: Callable[..., Tensor]) -> Callable[[fastvae.VAE, Tensor], Tensor]:
            return lambda vae, x: formula(vae, x, torch.randn(B, D), *weights)

        steps = {
            "fastvae": (ours, fastvae.reparameterize),
            "fastvae_compiled": (compiled(ours), fastvae.reparameterize),
            f"eager{self.means}": (drawing(self.formula), reparameterize_formula),
            f"compiled{self.means}": (drawing(compiled(self.formula)), reparameterize_formula),
        }
        return {name: Step(model(D, self.objective), D, *how) for name, how in steps.items()}

    def truth(self, x: Tensor, eps: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        """The loss and the gradients, by the formula, in the dtype of x."""
        vae = model(eps.shape[1]).to(x.dtype)
        with torch.no_grad():
            for own, given in zip(vae.parameters(), parameters, strict=True):
                own.copy_(given)
        loss = self.formula(vae, x, eps, *(w.to(x.dtype) for w in self.weights(len(x))))
        return loss.detach(), *torch.autograd.grad(loss, list(vae.parameters()))


ELBO = Training(None, elbo_loss)
BETA_TCVAE = Training(
    fastvae.BetaTCVAE(beta=BETA, dataset_size=DATASET_SIZE), broadcast_loss, lambda B: (stratified(B),), "_broadcast"
)
