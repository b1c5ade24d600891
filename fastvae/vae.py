"""The VAE: an encoder, a decoder, a likelihood, a prior and an objective, put together."""

import math
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .likelihoods import Likelihood, make_likelihood
from .mixture import GaussianMixture
from .objectives import ELBO, Objective
from .ops._checks import check_choice, check_count, check_tensor
from .ops._library import declare
from .ops.sampling import reparameterize, sample_gauss
from .priors import MixturePrior, Prior, StandardNormal, check_log_prob
from .streams import open_posteriors

# Opaque to the compiler, which would else compute a schedule again in the backward, from the counter that the
# forward has moved on by then.
_snapshot = declare("snapshot(Tensor x) -> Tensor", torch.empty_like, lambda backend, x: x.clone())


class VAEOutput(NamedTuple):
    """What a forward pass of `VAE` gives, in nats per example; `loss` is differentiable.

    Attributes:
        loss: what to minimize, a scalar.
        nell: mean −log p(x|z), the negative expected log-likelihood, a scalar.
        kl: mean KL(q(z|x) ‖ p(z)), a scalar. Both are differentiable too, but for those of `IWAE`.
        z: the samples `[B, D]`; `[k·m, B, D]` where the objective asks for several of each posterior.
        mu: the posteriors' means `[B, D]`.
        logvar: their log sigma² `[B, D]`.
        terms: all terms of the objective by name: `nell`, `kl` and `elbo`, and those of its own, of which `ess`,
            `saturation` and `mmd` are pure numbers.
    """

    loss: Tensor
    nell: Tensor
    kl: Tensor
    z: Tensor
    mu: Tensor
    logvar: Tensor
    terms: dict[str, Tensor]


class LogLikelihood(NamedTuple):
    """What `VAE.log_likelihood` gives.

    Attributes:
        log_px: log p(x) of each example, in nats `[B]`; −inf where no sample gave x a probability.
        ess: the effective sample size of its importance weights `[B]`, from 1 to n_samples, 0 where log_px is −inf.
    """

    log_px: Tensor
    ess: Tensor


PROPOSALS = ("posterior", "prior")

_PARTS = {
    "encoder": ("__call__",),
    "decoder": ("__call__",),
    "likelihood": ("log_prob", "mean", "check"),
    "prior": ("log_prob", "sample"),
    "objective": ("__call__", "k", "m"),
}


class VAE(nn.Module):
    """A variational autoencoder with diagonal Gaussian posteriors (Kingma & Welling 2014).

    Args:
        encoder: module or function from x `[B, ...]` to (mu, logvar), `[B, D]` each.
        decoder: module or function from z `[n, D]` to `[n, ...]`, the shape of x: logits for "bernoulli" and
            "binomial", means for "gaussian".
        likelihood: `"bernoulli"` for x in {0, 1}; `"binomial"` for counts 0..n, with `total_count=n`;
            `"gaussian"` for real values, with `variance=s²` (default 1), and `learned=True` to learn it.
            Or an object such as `fastvae.likelihoods.Gaussian(0.1)`.
        prior: p(z), an object with `log_prob(z)`, `marginal_log_prob(z)`, `sample(n)`, and `kl(mu, logvar)`
            where that has a closed form; None for `StandardNormal()`.
        objective: what the loss is, as `fastvae.objectives.Objective` describes it; None for `ELBO()`.
        **likelihood_options: `total_count`, `variance`, `learned`.

    Calling it draws the objective's samples and gives a `VAEOutput`. `step`, a buffer, counts the calls in
    training mode, for the objective's schedules.

    Raises:
        TypeError, ValueError: an argument is not what it should be; when called, the encoder or the decoder
            gives other shapes than expected, or x holds values that the likelihood gives no probability to.
            Looking at values makes a GPU wait, so there only the first batch is checked, and under
            `torch.compile` none is.

    Example:
        >>> vae = fastvae.VAE(encoder, decoder, likelihood="binomial", total_count=16)
        >>> vae(x).loss.backward()
    """

    step: Tensor

    def __init__(
        self,
        encoder: Any,
        decoder: Any,
        *,
        likelihood: str | Likelihood = "bernoulli",
        prior: Prior | None = None,
        objective: Objective | None = None,
        **likelihood_options: Any,
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = make_likelihood(likelihood, **likelihood_options)
        self.prior = StandardNormal() if prior is None else prior
        self.objective = ELBO() if objective is None else objective
        for name, needed in _PARTS.items():
            part = getattr(self, name)
            if isinstance(part, type) or not all(hasattr(part, method) for method in needed):
                raise TypeError(f"{name}: expected an object with {', '.join(needed)}, got {part!r}")
        self.register_buffer("step", torch.tensor(0))
        self._checked = False

    def forward(self, x: Tensor) -> VAEOutput:
        self._check(x)
        k, m = self.objective.k, self.objective.m
        mu, logvar = self.encode(x)
        samples, log_q, _, _ = sample_gauss(mu, logvar, k * m, outputs=("z", "log_q"))
        assert samples is not None
        assert log_q is not None
        z = samples.unflatten(0, (k, m))  # [k, m, B, D], the objective's to hook: `samples` stays as it is
        loss, terms = self.objective(
            self.log_px_z(x, z),
            self._log_pz(z),
            log_q.unflatten(0, (k, m)),
            z=z,
            mu=mu,
            logvar=logvar,
            prior=self.prior,
            step=_snapshot(self.step),
        )
        if self.training:
            self.step.add_(1)
        z = samples[0] if k * m == 1 else samples
        return VAEOutput(loss, terms["nell"], terms["kl"], z, mu, logvar, terms)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The posteriors' mu and logvar, `[B, D]` each."""
        posterior = self.encoder(x)
        if not (isinstance(posterior, tuple | list) and len(posterior) == 2):
            raise TypeError(f"encoder: expected the pair (mu, logvar), got {type(posterior).__name__}")
        mu, logvar = posterior
        check_tensor("encoder's mu", mu)
        check_tensor("encoder's logvar", logvar)
        if not (mu.ndim == 2 and mu.shape[0] == x.shape[0] and mu.shape == logvar.shape):
            shapes = f"{tuple(mu.shape)} and {tuple(logvar.shape)}"
            raise ValueError(f"encoder: expected mu and logvar of one shape [{x.shape[0]}, D], got {shapes}")
        return mu, logvar

    def decode(self, z: Tensor) -> Tensor:
        """E[x|z] in the units of x, z `[..., D]` to `[..., *x's]`."""
        return self.likelihood.mean(self._decoder_output(z))

    def log_px_z(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x|z) in nats, summed over all of x's axes but the first; z `[..., B, D]` to `[..., B]`, or
        `[..., 1, D]`, decoded once for all examples."""
        output = self._decoder_output(z)  # [..., B, *x's]
        if output.shape[z.ndim - 2] == 1:
            output = output.expand(*z.shape[:-2], len(x), *output.shape[z.ndim - 1 :])
        if output.shape[z.ndim - 2 :] != x.shape:
            raise ValueError(
                f"decoder: expected [n, *{tuple(x.shape[1:])}], the shape of x, got"
                f" [n, *{tuple(output.shape[z.ndim - 1 :])}]"
            )
        return self.likelihood.log_prob(x, output)[..., None].flatten(z.ndim - 1).sum(-1)

    @torch.no_grad()
    def log_likelihood(
        self, x: Tensor, n_samples: int, *, proposal: str = "posterior", batch_size: int = 4096
    ) -> LogLikelihood:
        """log p(x) of each example by importance sampling, log 1/n sum_n p(x|z_n) p(z_n) / r(z_n), without gradient.

        It is a lower bound in expectation that rises to log p(x) as n_samples grows. The effective sample size says
        whether it has got there: near 1, one sample has all the weight, and log p(x) is higher.

        Args:
            x: `[B, ...]`, any number of examples.
            n_samples: samples of each example.
            proposal: r(z): `"posterior"`, q(z|x), which needs few samples where it is near p(z|x); `"prior"`, p(z),
                which leaves the encoder out, decodes each sample once for `batch_size` examples, and needs samples
                beyond number where p(z|x) is narrow. The examples' errors are then correlated.
            batch_size: how many pairs of a sample and an example are in memory at once; does not change the result's
                distribution.

        Raises:
            TypeError: x is not a floating-point tensor, or a number not an integer.
            ValueError: an unknown `proposal`, no samples, or x outside the likelihood's support.

        Warns:
            UserWarning: the effective sample size is below 5 (harmonic mean over the examples), so that log p(x) is too
                low by an amount that cannot be told.

        Source: Zheng, eq. 36 to 38.

        Example:
            >>> log_px, ess = vae.eval().log_likelihood(x, 5000)
            >>> bits = -log_px.mean() / math.log(2) / x[0].numel()
        """
        self._check(x)
        check_count("n_samples", n_samples, least=1)
        check_count("batch_size", batch_size, least=1)
        check_choice("proposal", proposal, PROPOSALS)
        results = []
        for part in x.split(batch_size):
            posterior = self.encode(part) if proposal == "posterior" else None
            at_once = max(1, batch_size // max(1, len(part)))
            total = squares = torch.tensor(-math.inf, device=x.device)  # log sum w and log sum w², [B] from the first
            for first in range(0, n_samples, at_once):
                log_w = self._log_w(part, posterior, min(at_once, n_samples - first))  # [n, B]
                dtype, log_w = log_w.dtype, log_w.double()
                total = torch.logaddexp(total, log_w.logsumexp(0))
                squares = torch.logaddexp(squares, (2 * log_w).logsumexp(0))
            ess = (2 * total - squares).exp().masked_fill(total == -math.inf, 0.0)
            results.append(torch.stack((total - math.log(n_samples), ess)).to(dtype))
        log_px, ess = torch.cat(results, 1)
        typical = 1 / ess.reciprocal().mean()
        if typical < 5:
            warnings.warn(
                f"log_px: rests on an effective sample size of {typical:.1f} of {n_samples}, so it is too low, by an"
                " amount that cannot be told; take more n_samples, or another proposal",
                stacklevel=3,
            )
        return LogLikelihood(log_px, ess)

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        """Means E[x|z] of n draws z from the prior, `[n, *x's]`, from torch's generator."""
        return self.decode(self._sample_prior(n))

    @torch.no_grad()
    def fit_prior(
        self,
        loader: Any,
        n_components: int,
        *,
        n_samples: int = 1,
        device: torch.device | str | None = None,
        progress: bool = False,
        seed: int | None = None,
        **mixture_options: Any,
    ) -> GaussianMixture:
        """Ex-post density estimation: fits a Gaussian mixture to samples of the aggregate posterior q(z) of a trained
        VAE, and makes it the prior, so that `sample` draws where the decoder has been trained.

        The encoder and the decoder stay as they are; every later loss and log p(x) is that of the model with the new
        prior, a `MixturePrior`. Put the module in eval mode before.

        Args:
            loader: the examples: an iterable of batches x, or (x, labels), such as a DataLoader; or one tensor.
            n_components: K.
            n_samples: samples z of each example's posterior, all in memory at once.
            device: where to encode and fit; None for that of the VAE's parameters.
            progress: show a progress bar on stderr.
            seed: of the samples and of the fit; None draws from torch's generator.
            **mixture_options: of `GaussianMixture`: `tol`, `max_iter`, `n_init`, `init`, `reg_covar`.

        Returns:
            The fitted mixture.

        Raises:
            TypeError, ValueError: as in `GaussianMixture` and `kl_decomposition_dataset`.

        Source: Ghosh et al. 2020, section 4.

        Example:
            >>> vae.eval().fit_prior(DataLoader(data, 256), n_components=50)
            >>> images = vae.sample(64)
        """
        check_count("n_samples", n_samples, least=1)
        mixture = GaussianMixture(n_components, seed=seed, **mixture_options)
        if device is None:
            device = next((p.device for p in self.parameters()), None)
        posteriors = open_posteriors(loader, self.encode, chunk_size=4096, device=device, progress=progress)
        z = reparameterize(*posteriors.read(slice(None)), n_samples, seed=seed)  # [L, N, D]
        mixture.fit(z.flatten(0, 1))
        self.prior = MixturePrior.from_parameters(mixture.weights_, mixture.means_, mixture.variances_).to(z)
        return mixture

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """E[x|z] at the mean of each posterior, the shape of x."""
        return self.decode(self.encode(x)[0])

    def _log_w(self, x: Tensor, posterior: tuple[Tensor, Tensor] | None, n: int) -> Tensor:
        """n log importance weights of each example, `[n, B]`, for z drawn from its posterior, or from the prior."""
        if posterior is None:
            return self.log_px_z(x, self._sample_prior(n, x)[:, None])
        z, log_q, _, _ = sample_gauss(*posterior, n, outputs=("z", "log_q"))
        assert z is not None
        assert log_q is not None
        return self.log_px_z(x, z) + self._log_pz(z) - log_q

    def _log_pz(self, z: Tensor) -> Tensor:
        """log p(z), z `[..., D]` to `[...]`."""
        rows = z.flatten(0, -2)
        return check_log_prob("log_prob", self.prior.log_prob(rows), rows.shape[:1]).view(z.shape[:-1])

    def _sample_prior(self, n: int, like: Tensor | None = None) -> Tensor:
        """`[n, D]` from p(z), in the dtype of the parameters, or of `like` where there are none."""
        z = self.prior.sample(n)
        return z.to(next((p for p in self.parameters() if p.is_floating_point()), z if like is None else like))

    def _decoder_output(self, z: Tensor) -> Tensor:
        """The decoder's logits or means, z `[..., D]` to `[..., *x's]`; it sees all of them as one batch."""
        output = self.decoder(z.flatten(0, -2))
        return output.unflatten(0, z.shape[:-1])

    def _check(self, x: Tensor) -> None:
        check_tensor("x", x)
        if torch.compiler.is_compiling() or (self._checked and x.device.type != "cpu"):
            return
        self.likelihood.check(x)
        self._checked = True
