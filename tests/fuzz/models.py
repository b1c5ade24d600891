"""The surfaces of VAEs, of what is asked of them, and of the switches."""

import contextlib
import math
from typing import Any

import torch
from calls import Call, Draw, surface, tensors_of
from densities import close, data, log_likelihood
from support.helpers import kl, log_normal
from torch import Tensor, nn

import fastvae
from fastvae.backends import NAMES, status
from fastvae.models.bounds import GRADIENTS

LATENTS, PIXELS = 3, 5


class Coder(nn.Module):
    def __init__(self, draw: Draw, n_in: int, *n_out: int):
        super().__init__()
        self.maps = nn.ParameterList(torch.randn(n_in, n, generator=draw.generator) / 3 for n in n_out)

    def forward(self, x: Tensor) -> Any:
        results = tuple(torch.tanh(x @ w) for w in self.maps)
        return results if len(results) > 1 else results[0]


def objective(draw: Draw) -> tuple[str, dict[str, Any]]:
    """The name of one, and its arguments."""
    beta, size = draw.choice((0, 1.0, 4)), draw.choice((60, 60_000))
    bits, capacity = draw.choice((0.0, 0.1)), draw.choice((None, 2.0))
    m, k, gradient = draw.choice((1, 4)), draw.choice((1, 3)), draw.choice(GRADIENTS)
    mmd = {"divergence": "mmd", "bandwidth": draw.choice((None, 2.0))}
    agg_kl = {"divergence": "agg_kl", "dataset_size": size, "estimator": "mss"}
    return draw.choice(
        (
            ("ELBO", {"beta": beta, "free_bits": bits, "capacity": capacity, "k": k}),
            ("IWAE", {"m": m, "k": k, "gradient": gradient}),
            ("BetaTCVAE", {"alpha": 1.0, "beta": beta, "gamma": 1.0, "dataset_size": size, "estimator": None, "k": k}),
            ("InfoVAE", {"alpha": draw.choice((0.0, 1, -2.5)), "lambda_": 10, **mmd, "k": k}),
            ("InfoVAE", {"alpha": 0.5, "lambda_": 2.0, **agg_kl, "k": k}),
        )
    )


@surface
def vae(draw: Draw) -> Call:
    B = draw.choice((2, 3, 16))
    x, kind, options = data(draw, B, PIXELS)
    name, settings = objective(draw)
    coders = {"encoder": Coder(draw, PIXELS, LATENTS, LATENTS), "decoder": Coder(draw, LATENTS, PIXELS)}

    def function(x: Any, encoder: Any, decoder: Any, likelihood: Any, prior: Any, **others: Any) -> Any:
        of_objective = {key: value for key, value in others.items() if key in settings}
        of_likelihood = {key: value for key, value in others.items() if key not in settings}
        made = getattr(fastvae, name)(**of_objective)
        model = fastvae.VAE(encoder, decoder, likelihood=likelihood, prior=prior, objective=made, **of_likelihood)
        out = model(x)
        if out.loss.requires_grad:
            out.loss.backward()
        return out

    def check(out: fastvae.VAEOutput, arguments: dict[str, Any]) -> None:
        with torch.no_grad():
            mu, logvar = (y.double() for y in coders["encoder"](x))
            z = out.z.double()
            output = coders["decoder"](out.z).double()
            log_px_z = log_likelihood(kind, x.double(), output, **options).sum(-1)
        zero, terms = torch.zeros_like(mu), out.terms
        log_w = log_px_z + log_normal(z, zero, zero).sum(-1) - log_normal(z, mu, logvar).sum(-1)
        divergence = kl(mu, logvar, zero, zero)  # [B, D]
        nell, dims = -log_px_z.mean(), divergence.mean(0)
        close("mu", out.mu, mu)
        close("nell", out.nell, nell)
        if name == "ELBO":
            penalty = dims.clamp(min=settings["free_bits"]).sum()
            penalty = penalty if settings["capacity"] is None else (penalty - settings["capacity"]).abs()
            close("loss", out.loss, nell + settings["beta"] * penalty)
            close("kl", out.kl, dims.sum())
        elif name == "IWAE":
            log_w = log_w.reshape(settings["k"], settings["m"], B)
            close("loss", out.loss, -(log_w.logsumexp(1) - math.log(settings["m"])).mean())
        elif name == "InfoVAE":
            a, b, of = settings["alpha"], settings["lambda_"], terms[settings["divergence"]].double()
            close("loss", out.loss, nell + (1 - a) * dims.sum() + (a + b - 1) * of)
        else:
            beta = settings["beta"]
            close("loss", out.loss, nell + terms["mi"] + beta * terms["tc"] + terms["dim_kl"].sum())
            close("kl", out.kl, terms["mi"] + terms["tc"] + terms["dim_kl"].sum())
        if out.loss.requires_grad:
            for parameter in [p for coder in coders.values() for p in coder.parameters()]:
                assert parameter.grad is not None, "a parameter without gradient"
                assert parameter.grad.isfinite().all(), "a gradient that is not finite"

    arguments = {"x": x, **coders, "likelihood": kind, "prior": None, **options, **settings}
    return Call(
        function, arguments, check=None if draw.extreme else check, costly=("k", "m"), draws=True, own_device=True
    )


@surface
def vae_methods(draw: Draw) -> Call:
    B = draw.choice((1, 2, 7))
    x, kind, options = data(draw, B, PIXELS)
    coders = Coder(draw, PIXELS, LATENTS, LATENTS), Coder(draw, LATENTS, PIXELS)
    model = fastvae.VAE(*coders, likelihood=kind, prior=fastvae.StandardNormal(LATENTS), **options).eval()
    prior = fastvae.MixturePrior(4, LATENTS)
    arguments = {
        "x": x,
        "z": draw.normal(B, LATENTS).float(),
        "n": draw.choice((2, 5)),
        "n_samples": draw.choice((1, 9)),
        "n_prior": draw.choice((2, 5)),
        "n_importance": draw.choice((1, 9)),
        "proposal": draw.choice(("posterior", "prior")),
        "batch_size": draw.choice((1, 3, 4096)),
        "n_components": 2,
        "seed": draw.choice((0, 7, -3, 2**40, None)),
        "prior": draw.choice((None, prior)),
    }

    def function(
        x: Any,
        z: Any,
        n: Any,
        n_samples: Any,
        n_prior: Any,
        n_components: Any,
        seed: Any,
        prior: Any,
        **importance: Any,
    ) -> Any:
        decoded, evidence = model.decode(z), model.log_px_z(x, z)
        likely = model.log_likelihood(x, **importance)
        model.fit_prior([x, x], n_components, n_samples=n_samples, seed=seed)
        known = fastvae.decoder_mutual_information(model, n_prior=n_prior, seed=seed, **importance)
        batch_size = importance["batch_size"]
        hole = fastvae.prior_hole(model, [x, x], prior=prior, n_prior=n_prior, seed=seed, batch_size=batch_size)
        return decoded, evidence, likely, known, hole, model.sample(n), model.reconstruct(x)

    def check(result: Any, arguments: dict[str, Any]) -> None:
        decoded, evidence, likely, _, hole, sampled, reconstructed = result
        output = model.decoder(arguments["z"]).double()
        close("log_px_z", evidence, log_likelihood(kind, x.double(), output, **options).sum(-1))
        mean = output if kind == "gaussian" else output.sigmoid() * options.get("total_count", 1)
        close("decode", decoded, mean)
        assert likely.log_px.shape == likely.ess.shape == (B,), "the shape of log_px"
        assert (likely.ess <= arguments["n_importance"] * 1.001).all(), "more effective samples than samples"
        assert sampled.shape == (arguments["n"], PIXELS), "the shape of sample"
        assert reconstructed.shape == x.shape, "the shape of reconstruct"
        for tensor in tensors_of((likely, hole.terms, reconstructed, sampled)):
            assert tensor.isfinite().all(), "a result is not finite"

    return Call(
        function,
        arguments,
        check=None if draw.extreme else check,
        costly=("n_samples", "n", "n_prior", "n_importance"),
        draws=True,
        own_device=True,
    )


@surface
def switches(draw: Draw) -> Call:
    available = [name for name in NAMES if status(name).available]
    arguments = {
        "backend": draw.choice((None, *available)),
        "exact_skip": draw.choice((None, True, False)),
        "precision": draw.choice(("exact", "tf32x3")),
    }
    in_short = draw.chance(0.5)

    def function(**settings: Any) -> Any:
        with contextlib.ExitStack() as stack:
            if in_short:
                stack.enter_context(fastvae.precision(settings.pop("precision")))
                stack.enter_context(fastvae.use_backend(settings.pop("backend"), **settings))
            else:
                stack.enter_context(fastvae.use(**settings))
            return fastvae.kl_gauss(torch.zeros(2, 2), torch.zeros(2, 2))

    return Call(function, arguments, own_device=True)
