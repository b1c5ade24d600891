"""VAE: against formulas written out with torch.distributions, and through what PyTorch does to modules."""

import math
import re
import warnings
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint
from support.linear_gaussian import LinearGaussian
from torch import Tensor, nn
from torch import distributions as dist

import fastvae
from fastvae import ELBO, IWAE, VAE, StandardNormal
from fastvae.models.likelihoods import Gaussian

D = 3


class Encoder(nn.Module):
    """x [B, ...] to (mu, logvar) [B, D]."""

    def __init__(self, n_inputs: int):
        super().__init__()
        self.linear = nn.Linear(n_inputs, 2 * D)

    def forward(self, x):
        return self.linear(x.flatten(1)).chunk(2, dim=1)


def make_vae(shape=(4, 5), **options):
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(D, math.prod(shape)), nn.Unflatten(1, shape))
    return VAE(Encoder(math.prod(shape)), decoder, **options).double()


def linear_gaussian_vae(model, encoder, **options):
    return VAE(encoder, model.decode, likelihood=Gaussian(model.s2), **options)


def binary(*shape):
    return torch.randint(2, shape).double()


DATA: dict[str, tuple[dict[str, Any], Any, Any]] = {  # options, what draws x, and p(x|z) of the decoder's output
    "bernoulli": ({}, binary, lambda output: dist.Bernoulli(logits=output)),
    "binomial": (
        {"total_count": 16},
        lambda *shape: torch.randint(17, shape).double(),
        lambda output: dist.Binomial(16, logits=output),
    ),
    "gaussian": (
        {"variance": 0.25},
        lambda *shape: torch.randn(shape).double(),
        lambda output: dist.Normal(output, 0.5),
    ),
}


class Several:
    """An objective of its own: a bound with m samples inside the logarithm and k outside, by the protocol."""

    def __init__(self, k, m):
        self.k, self.m = k, m

    def __call__(self, draws):
        self.log_w = draws.log_px_z + draws.log_pz - draws.log_qz_x  # [k, m, B]
        self.z = draws.z
        loss = -(self.log_w.logsumexp(1) - math.log(self.m)).mean()
        return loss, {"nell": -draws.log_px_z.mean(), "kl": (draws.log_qz_x - draws.log_pz).mean(), "bound": -loss}


@pytest.mark.parametrize("likelihood", DATA)
@pytest.mark.parametrize("shape", [(), (4,), (1, 4, 5)])
def test_log_px_z_is_the_sum_of_the_terms(likelihood, shape):
    """For samples of each example, and for samples that serve all examples."""
    options, draw, p_x = DATA[likelihood]
    vae = make_vae((*shape, 4), likelihood=likelihood, **options)
    x = draw(6, *shape, 4)
    for z in (torch.randn(6, D), torch.randn(2, 3, 6, D), torch.randn(5, 1, D)):
        z = z.double()
        output = vae.decoder(z.flatten(0, -2)).view(*z.shape[:-1], *shape, 4)
        expected = p_x(output).log_prob(x).flatten(z.ndim - 1).sum(-1)
        torch.testing.assert_close(vae.log_px_z(x, z), expected)


class Plain:
    """A likelihood by the protocol, with no more than it must have."""

    discrete = True

    def log_prob(self, x, output):
        return dist.Bernoulli(logits=output).log_prob(x)

    def mean(self, output):
        return torch.sigmoid(output)

    def check(self, x):
        pass

    def sample(self, output):
        return torch.bernoulli(torch.sigmoid(output))


class OfExamples(Plain):
    """One that has its own way to the sum."""

    def log_prob(self, x, output):
        raise AssertionError("the terms were asked for")

    def example_log_prob(self, x, output):
        return super().log_prob(x, output).flatten(output.ndim - x.ndim + 1).sum(-1)


@pytest.mark.parametrize("likelihood", [Plain(), OfExamples()])
def test_a_likelihood_of_ones_own_may_sum_its_terms_itself(likelihood):
    x, losses = binary(6, 4, 5), []
    for given in ("bernoulli", likelihood):
        vae = make_vae(likelihood=given)
        torch.manual_seed(1)
        losses.append(vae(x).loss)
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("likelihood", DATA)
@pytest.mark.parametrize("shape", [(4,), (1, 4, 5)])
def test_elbo_is_the_formula(likelihood, shape):
    options, draw, p_x = DATA[likelihood]
    vae = make_vae(shape, likelihood=likelihood, objective=ELBO(beta=2.0), **options)
    x = draw(31, *shape)
    out = vae(x)
    mu, logvar = vae.encoder(x)
    q = dist.Independent(dist.Normal(mu, torch.exp(0.5 * logvar)), 1)
    p = dist.Independent(dist.Normal(torch.zeros_like(mu), 1.0), 1)
    nell = -p_x(vae.decoder(out.z)).log_prob(x).flatten(1).sum(1).mean()
    kl = dist.kl_divergence(q, p).mean()
    for ours, expected in (
        (out.nell, nell),
        (out.kl, kl),
        (out.loss, nell + 2 * kl),
        (out.terms["elbo"], -nell - kl),
        (out.mu, mu),
        (out.logvar, logvar),
    ):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-12)
    assert out.z.shape == mu.shape


def test_gradients_are_the_formulas():
    vae = make_vae(likelihood="binomial", total_count=16)
    x = torch.randint(17, (31, 4, 5)).double()
    torch.manual_seed(1)
    out = vae(x)
    ours = torch.autograd.grad(out.loss, list(vae.parameters()))
    mu, logvar = vae.encoder(x)
    eps = ((out.z - mu) * torch.exp(-0.5 * logvar)).detach()
    log_px_z = dist.Binomial(16, logits=vae.decoder(mu + torch.exp(0.5 * logvar) * eps)).log_prob(x)
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1)
    expected = torch.autograd.grad((-log_px_z.flatten(1).sum(1) + kl).mean(), list(vae.parameters()))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (3, 1), (1, 4), (3, 4)])
def test_the_exact_posterior_of_a_linear_gaussian_model_makes_every_sample_log_px(k, m):
    model = LinearGaussian(6, D)
    objective = Several(k, m)
    vae = linear_gaussian_vae(model, model.posterior, objective=objective)
    x = model.draw(31)
    log_px = model.log_px(x)
    out = vae(x)
    torch.testing.assert_close(objective.log_w, log_px.expand(k, m, 31), rtol=0, atol=1e-10)
    torch.testing.assert_close(out.loss, -log_px.mean(), rtol=0, atol=1e-10)

    class WithoutClosedForm:
        log_prob, sample = StandardNormal().log_prob, None

    elbo = linear_gaussian_vae(model, model.posterior, prior=WithoutClosedForm())(x)
    torch.testing.assert_close(elbo.terms["elbo"], log_px.mean(), rtol=0, atol=1e-10)


def test_an_objective_of_several_samples_gets_and_gives_them():
    objective = Several(3, 4)
    vae = make_vae(objective=objective)
    x = binary(7, 4, 5)
    out = vae(x)
    assert objective.log_w.shape == (3, 4, 7)
    assert objective.z.shape == (3, 4, 7, D)
    assert out.z.shape == (12, 7, D)
    torch.testing.assert_close(out.terms["bound"], -out.loss)
    fastvae.agg_entropy(out.z, out.mu, out.logvar).backward()  # takes [L, B, D] as it is
    log_px_z = torch.stack([vae.log_px_z(x, z) for z in out.z])
    torch.testing.assert_close(log_px_z.view(3, 4, 7), vae.log_px_z(x, objective.z))


def test_gradients_through_z_pass_the_tensor_the_objective_got():
    """A doubly reparameterized gradient hooks z: nothing may reach the encoder around it but log q(z|x)."""

    class Blocked(Several):
        def __call__(self, draws):
            draws.z.register_hook(torch.zeros_like)
            draws._log_qz_x = draws.log_qz_x.detach()
            return super().__call__(draws)

    vae = make_vae(objective=Blocked(2, 3))
    vae(binary(7, 4, 5)).loss.backward()
    assert vae.encoder.linear.weight.grad.count_nonzero() == 0
    assert vae.decoder[0].weight.grad.count_nonzero() > 0


# log p(x) by importance sampling.


def wrong_posterior(model):
    """An encoder to posteriors off in place, and twice as wide."""

    def encoder(x):
        mu, logvar = model.posterior(x)
        return mu + 0.1, logvar + 1.4

    return encoder


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_log_likelihood_is_exact_at_the_exact_posterior(batch_size):
    model = LinearGaussian(6, D)
    vae = linear_gaussian_vae(model, model.posterior)
    x = model.draw(31)
    result = vae.log_likelihood(x, 13, batch_size=batch_size)
    torch.testing.assert_close(result.log_px, model.log_px(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(result.ess, torch.full((31,), 13.0).double())
    assert not result.log_px.requires_grad
    assert int(vae.step) == 0


@pytest.mark.parametrize("proposal", ["posterior", "prior"])
def test_log_likelihood_converges_to_log_px(proposal):
    """The error of log p(x) has a variance of 1 / ess. None of 62 errors is above 5 of its standard deviations: by
    chance one would be, with either proposal, for 4 in 10^5 seeds."""
    model = LinearGaussian(6, D)
    vae = linear_gaussian_vae(model, wrong_posterior(model), prior=StandardNormal(D))
    x = model.draw(31)
    torch.manual_seed(0)
    spread = []
    for n in (1000, 100_000):
        log_px, ess = vae.log_likelihood(x, n, proposal=proposal, batch_size=40_000)
        error = log_px - model.log_px(x)
        spread.append(error.square().mean().sqrt())
        if n == 100_000:
            assert (error.abs() * ess.sqrt() < 5).all()
            assert (ess > 200).all()
            assert (ess < n).all()
    assert spread[1] < spread[0] / 4


def test_log_likelihood_streams():
    """The log-likelihood of given samples is the formula, at any number of rows at once; and that number is kept to."""

    class Given(StandardNormal):
        given: Tensor

        def sample(self, n):
            self.given, drawn = self.given[n:], self.given[:n]
            return drawn

    prior, rows = Given(D), []
    z = torch.randn(101, D).double()
    x = torch.randint(17, (5, 4)).double()
    linear = nn.Linear(D, 4).double()

    def decoder(z):
        rows.append(len(z))
        return linear(z)

    vae = VAE(lambda x: 1 / 0, decoder, likelihood="binomial", total_count=16, prior=prior)  # the encoder is left out
    log_w = dist.Binomial(16, logits=linear(z)[:, None]).log_prob(x).sum(-1)  # [101, 5]
    for batch_size, at_once in ((1, 1), (5, 1), (64, 12), (10_000, 101)):
        prior.given = z.repeat(-(-5 // batch_size), 1)  # all of them for each part of x
        rows.clear()
        result = vae.log_likelihood(x, 101, proposal="prior", batch_size=batch_size)
        torch.testing.assert_close(result.log_px, log_w.logsumexp(0) - math.log(101))
        torch.testing.assert_close(result.ess, fastvae.effective_sample_size(log_w, dim=0))
        assert max(rows) == at_once


def test_log_likelihood_of_what_the_model_does_not_give_is_minus_infinity():
    class Impossible(Gaussian):
        def log_prob(self, x, output):
            return super().log_prob(x, output).masked_fill(x > 5, -math.inf)

    vae = make_vae((4,), likelihood=Impossible())
    x = torch.randn(3, 4).double()
    x[1, 2] = 6
    log_px, ess = vae.log_likelihood(x, 20, batch_size=10)
    assert log_px.isinf().tolist() == [False, True, False]
    assert log_px[1] == -math.inf
    assert ess[1] == 0
    assert (ess[::2] >= 1).all()


def test_log_likelihood_warns_of_too_few_samples():
    model = LinearGaussian(6, D)
    x = model.draw(31)
    for posterior, n, warned in (
        (model.posterior, 13, False),
        (model.posterior, 4, True),
        (wrong_posterior(model), 13, True),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _, ess = linear_gaussian_vae(model, posterior).log_likelihood(x, n)
        assert (1 / ess.reciprocal().mean() < 5) == warned
        assert [w.filename for w in caught] == [__file__] * warned
        assert all(re.match(rf"log_px: .*effective sample size of \d\.\d of {n},", str(w.message)) for w in caught)


def test_log_likelihood_takes_any_number_of_examples_and_dtypes():
    vae = make_vae(likelihood="binomial", total_count=16, prior=StandardNormal(D))
    for proposal in ("posterior", "prior"):
        assert vae.log_likelihood(torch.zeros(0, 4, 5).double(), 3, proposal=proposal).log_px.shape == (0,)
    x = torch.randint(17, (7, 4, 5))
    for dtype, result in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        for proposal in ("posterior", "prior"):
            log_px, ess = vae.to(dtype).log_likelihood(x.to(dtype), 3, proposal=proposal, batch_size=4)
            assert log_px.dtype == ess.dtype == result
            assert ((ess >= 1 - 1e-6) & (ess <= 3 + 1e-6)).all()


def test_sample_decode_reconstruct():
    vae = make_vae((1, 2, 5), likelihood="binomial", total_count=16)
    x = torch.randint(17, (7, 1, 2, 5)).double()
    with pytest.raises(ValueError, match=r"^dim: "):
        vae.sample(3)
    vae(x)
    torch.manual_seed(5)
    samples = vae.sample(3)
    torch.manual_seed(5)
    expected = 16 * torch.sigmoid(vae.decoder(torch.randn(3, D).double()))
    torch.testing.assert_close(samples, expected)
    assert samples.shape == (3, 1, 2, 5)
    torch.testing.assert_close(vae.reconstruct(x), vae.decode(vae.encode(x)[0]))
    z = torch.randn(2, 6, D).double()
    assert vae.decode(z).shape == (2, 6, 1, 2, 5)
    torch.testing.assert_close(vae.decode(z[0, 0]), vae.decode(z)[0, 0])
    assert not samples.requires_grad
    assert not vae.reconstruct(x).requires_grad
    assert VAE(vae.encoder, vae.decoder, prior=StandardNormal(D)).sample(2).shape == (2, 1, 2, 5)


def warm_up(step):
    return (step / 9).clamp(max=1)


def gradients(vae, loss):
    """The gradients of the parameters, by a call that draws the samples of seed 3."""
    torch.manual_seed(3)
    return torch.autograd.grad(loss(), list(vae.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_a_call_changes_nothing(training):
    vae = make_vae(objective=ELBO(beta=warm_up)).train(training)
    if training:
        vae(binary(7, 4, 5))  # from which N(0, I) takes its dimension
    vae.step.fill_(4)
    before = {name: (x.clone(), x._version) for name, x in vae.state_dict(keep_vars=True).items()}
    vae(binary(7, 4, 5))
    for name, x in vae.named_parameters():
        assert x._version == before[name][1]
    for name, x in vae.named_buffers():
        assert name not in before or x._version == before[name][1]
    assert int(vae.step) == 4


def test_the_loop_moves_schedules_on():
    seen = []

    def noted(step):
        seen.append(int(step))
        return warm_up(step)

    vae = make_vae(objective=ELBO(beta=noted))
    x = binary(7, 4, 5)
    for _ in range(3):
        vae(x)
        vae(x).loss.backward()
        vae.advance()
    vae.eval()(x)
    assert seen == [0, 0, 1, 1, 2, 2, 3]
    assert int(vae.step) == 3
    out = vae(x, step=9)
    torch.testing.assert_close(out.loss, out.nell + out.kl)
    vae(x, step=torch.tensor(5))
    assert seen[-2:] == [9, 5]
    assert int(vae.step) == 3


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_accumulation_see_one_step(reentrant):
    """Checkpointing calls the module again in the backward, and accumulation calls it several times a step."""
    vae = make_vae(objective=ELBO(beta=warm_up))
    vae.step.fill_(4)
    x = binary(8, 4, 5).requires_grad_()
    expected = gradients(vae, lambda: vae(x).loss)
    for micro_batches in (1, 2):
        torch.manual_seed(3)
        torch.utils.checkpoint.checkpoint(vae, x, use_reentrant=reentrant)[0].backward()
        torch.testing.assert_close([p.grad for p in vae.parameters()], [micro_batches * g for g in expected])


@pytest.mark.parametrize("objective", [ELBO(beta=warm_up), fastvae.IWAE(4, gradient="dreg")])
@pytest.mark.parametrize("training", [True, False])
def test_functional_calls_and_their_gradients(objective, training):
    vae = make_vae(objective=objective).train(training)
    x = binary(7, 4, 5)
    parameters = {name: p.detach() for name, p in vae.named_parameters()}
    expected = gradients(vae, lambda: vae(x).loss)
    torch.manual_seed(3)
    ours = torch.func.grad(lambda p: torch.func.functional_call(vae, p, (x,)).loss)(parameters)
    torch.testing.assert_close(list(ours.values()), list(expected))
    everything = parameters | dict(vae.named_buffers()) | {"step": torch.tensor(9)}
    torch.manual_seed(3)
    out = torch.func.functional_call(vae, everything, (x,))
    torch.manual_seed(3)
    torch.testing.assert_close(out.loss, vae(x, step=9).loss)


def test_a_schedule_that_stands_still_is_worth_a_warning(monkeypatch):
    monkeypatch.setattr("fastvae.models.steps.PATIENCE", 5)
    x = binary(7, 4, 5)

    def messages(vae, call=lambda vae: vae(x), n=12):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(n):
                call(vae)
        assert {w.filename for w in caught} <= {__file__}
        return [str(w.message) for w in caught]

    (message,) = messages(make_vae(objective=ELBO(beta=warm_up)))
    assert re.match(r"step: .*schedule of beta stands still.*vae\.advance\(\).*step=", message)
    assert messages(make_vae(objective=ELBO(beta=warm_up)), lambda vae: torch.nn.Sequential(vae)(x)) == [message]
    assert not messages(make_vae(objective=ELBO(beta=warm_up)).eval())
    assert not messages(make_vae(objective=ELBO(beta=2.0)))
    assert not messages(make_vae(objective=ELBO(beta=warm_up)), lambda vae: vae(x, step=0))
    moved = make_vae(objective=ELBO(beta=warm_up))
    moved.step.fill_(3)
    assert not messages(moved)
    compiled: Any = torch.compile(make_vae(objective=ELBO(beta=warm_up)), fullgraph=True, backend="eager")
    assert not messages(compiled)
    assert compiled._standing == 0


def test_state_dict_round_trip():
    vae = make_vae(likelihood="gaussian", learned=True, variance=0.5)
    x = torch.randn(7, 4, 5).double()
    vae(x)
    vae.advance()
    other = make_vae(likelihood="gaussian", learned=True)
    nn.init.zeros_(other.encoder.linear.weight)
    other.load_state_dict(vae.state_dict())
    for model in (vae, other):
        torch.manual_seed(9)
        model.result = (*model(x)[:6], model.sample(2))
    for ours, theirs in zip(vae.result, other.result, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert int(other.step) == 1


@pytest.mark.parametrize("training", [True, False])
def test_older_checkpoints_load(training):
    """Checkpoints load from when `prior.dim` and a fixed variance were buffers."""
    vae = make_vae(likelihood="gaussian")
    saved = {
        **{name: p.detach() for name, p in vae.named_parameters()},
        "step": torch.tensor(7),
        "prior.dim": torch.tensor(D),
        "likelihood.log_variance": torch.tensor(math.log(0.5)),
    }
    assert set(vae.state_dict()) == set(saved)
    vae.load_state_dict(saved)
    assert int(vae.step) == 7
    assert vae.sample(2).shape == (2, 4, 5)
    assert vae.likelihood.log_variance == torch.tensor(math.log(0.5)).item()


@pytest.mark.parametrize("default", [torch.device("meta"), torch.float64])
@pytest.mark.parametrize("likelihood", DATA)
def test_defaults_are_not_taken_for_what_the_module_has(likelihood, default):
    options, draw, _ = DATA[likelihood]
    vae = make_vae(likelihood=likelihood, prior=StandardNormal(D), objective=ELBO(beta=warm_up), **options).float()
    x = draw(16, 4, 5).float()
    results = []
    for named in (False, True):
        try:
            if named:
                (torch.set_default_dtype if default == torch.float64 else torch.set_default_device)(default)
            torch.manual_seed(0)
            out = vae(x, step=4)
            samples = vae.sample(3)
            log_px = vae.log_likelihood(x, 20, proposal="prior").log_px
            results.append((out.loss, out.z, samples, log_px))
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
    torch.testing.assert_close(*results)  # device and dtype too


def test_on_the_meta_device():
    for options in ({}, {"likelihood": "gaussian", "learned": True}, {"objective": ELBO(beta=warm_up)}):
        vae = make_vae(**options).to("meta")
        repr(vae)
        out = vae(torch.zeros(7, 4, 5, device="meta", dtype=torch.float64))
        assert out.loss.device.type == "meta"
        assert out.loss.shape == ()
        assert vae.sample(2).shape == (2, 4, 5)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("likelihood", DATA)
def test_compiles_to_one_graph(likelihood):
    options, draw, _ = DATA[likelihood]
    vae = make_vae(likelihood=likelihood, objective=ELBO(beta=warm_up), **options)
    compiled: Any = torch.compile(vae, fullgraph=True, backend="aot_eager")
    x = draw(31, 4, 5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in (0, 4, 5):
            results = []
            for model in (compiled, vae):
                vae.zero_grad()
                torch.manual_seed(2)
                out = model(x)
                out.loss.backward()
                results.append((out.loss.detach(), out.z, [p.grad.clone() for p in vae.parameters()]))
            torch.testing.assert_close(*results)
            assert int(vae.step) == step
            vae.step.fill_(max(step, 3))
            vae.advance()
        assert compiled.sample(2).shape == (2, 4, 5)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_step_given_as_a_tensor_compiles_to_one_graph():
    vae = make_vae(objective=ELBO(beta=warm_up))
    compiled = torch.compile(vae, fullgraph=True, backend="eager")
    x = binary(7, 4, 5)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(4):
            out = compiled(x, step=torch.tensor(step))
            torch.testing.assert_close(out.loss, out.nell + step / 9 * out.kl)


@pytest.mark.usefixtures("fresh_compiler")
def test_batches_of_any_size_compile_to_two_graphs():
    counter = torch._dynamo.testing.CompileCounter()
    vae = make_vae(objective=ELBO(beta=warm_up))
    compiled = torch.compile(vae, fullgraph=True, backend=counter)
    for B in (8, 13, 5, 31, 7, 16, 9, 64, 3, 12):
        x = binary(B, 4, 5)
        ours = gradients(vae, lambda: compiled(x).loss)  # noqa: B023
        torch.testing.assert_close(ours, gradients(vae, lambda: vae(x).loss))  # noqa: B023
        vae.advance()
    assert counter.frame_count == 2


@pytest.mark.parametrize("likelihood", DATA)
def test_autocast_and_half_precision(likelihood):
    options, draw, _ = DATA[likelihood]
    vae = make_vae(likelihood=likelihood, **options).float()
    x = draw(31, 4, 5).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = vae(x)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    half = vae.bfloat16()(x.bfloat16())
    assert half.loss.dtype == torch.float32
    assert vae.sample(2).dtype == torch.bfloat16
    torch.testing.assert_close(half.kl, out.kl, rtol=0.05, atol=0)


def test_data_outside_the_support_is_refused_where_it_can_be_looked_at():
    x = binary(7, 4, 5)
    vae = make_vae()
    vae(x)
    with pytest.raises(ValueError, match=r"^x: .*binomial.*gaussian"):
        vae(x + 0.5)
    compiled = torch.compile(vae, fullgraph=True, backend="aot_eager")
    assert compiled(x + 0.5).loss.isfinite()  # the compiler does not look


def test_likelihoods_and_priors_as_objects():
    class Laplace(nn.Module):
        def log_prob(self, x, output):
            return dist.Laplace(output, 1.0).log_prob(x)

        def mean(self, output):
            return output

        def check(self, x):
            pass

    vae = make_vae(likelihood=Laplace(), prior=StandardNormal(D))
    x = torch.randn(7, 4, 5).double()
    out = vae(x)
    expected = -dist.Laplace(vae.decoder(out.z), 1.0).log_prob(x).flatten(1).sum(1).mean()
    torch.testing.assert_close(out.nell, expected)


def give(result):
    return lambda x: result


class Loss(Several):
    """The loss alone."""

    def __init__(self):
        super().__init__(1, 1)

    def __call__(self, draws):
        return super().__call__(draws)[0]


def prior_of(log_prob):
    """N(0, I), but for what `log_prob` makes of the log-densities of its dimensions, `[S, D]`."""
    prior: Any = StandardNormal(D)
    prior.log_prob = lambda z: log_prob(prior.marginal_log_prob(z))
    return prior


def with_prior(log_prob):
    return make_vae(objective=IWAE(1), prior=prior_of(log_prob))(binary(7, 4, 5))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: VAE(None, nn.Identity()), TypeError, "encoder: "),
        (lambda: VAE(nn.Identity(), 3), TypeError, "decoder: "),
        (lambda: make_vae(likelihood="poisson"), ValueError, "likelihood: .*bernoulli"),
        (lambda: make_vae(likelihood=Gaussian), TypeError, "likelihood: "),
        (lambda: make_vae(likelihood="bernoulli", total_count=3), TypeError, ".*total_count"),
        (lambda: make_vae(prior=StandardNormal), TypeError, "prior: "),
        (lambda: make_vae(prior=3), TypeError, "prior: .*log_prob"),
        (
            lambda: with_prior(lambda p: p),
            ValueError,
            r"prior: .*\(7,\).*\(7, 3\)",
        ),
        (
            lambda: with_prior(lambda p: p.sum(1, True)),
            ValueError,
            "prior: .*log_prob",
        ),
        (
            lambda: with_prior(lambda p: p.sum()),
            ValueError,
            "prior: .*log_prob",
        ),
        (lambda: make_vae(objective=ELBO), TypeError, "objective: "),
        (lambda: make_vae(objective=lambda *args: 0), TypeError, "objective: .*k, m"),
        (lambda: make_vae()([1.0]), TypeError, "x: "),
        (lambda: make_vae()(binary(0, 4, 5)), ValueError, "x: .*at least one example"),
        (lambda: make_vae()(binary(2, 4, 5), step=-1), ValueError, "step: "),
        (lambda: make_vae()(binary(2, 4, 5), step=1.0), TypeError, "step: "),
        (lambda: make_vae()(binary(2, 4, 5), step=torch.tensor(1.0)), TypeError, "step: .*float32"),
        (lambda: make_vae()(binary(2, 4, 5), step=torch.tensor([1])), ValueError, "step: "),
        (lambda: make_vae(objective=Loss())(binary(2, 4, 5)), TypeError, "objective: .*'nell'"),
        (lambda: make_vae().encode([1.0]), TypeError, "x: "),
        (lambda: make_vae().encode(torch.tensor(1.0)), TypeError, "x: "),
        (lambda: make_vae().decode([1.0]), TypeError, "z: "),
        (lambda: make_vae().decode(torch.zeros(2, D).long()), TypeError, "z: "),
        (lambda: make_vae().decode(torch.tensor(1.0)), ValueError, "z: "),
        (lambda: make_vae().log_px_z([1.0], torch.zeros(2, D)), TypeError, "x: "),
        (lambda: make_vae().log_px_z(binary(2, 4, 5), None), TypeError, "z: "),
        (lambda: make_vae().log_px_z(binary(2, 4, 5), torch.zeros(3, D).double()), ValueError, r"z: .*\(3, 3\)"),
        (lambda: make_vae().reconstruct("x"), TypeError, "x: "),
        (lambda: make_vae(prior=StandardNormal(D)).sample(2**62), ValueError, "n: "),
        (lambda: make_vae(prior=StandardNormal(D)).sample(2.0), TypeError, "n: "),
        (lambda: VAE(nn.Identity(), give(3)).decode(torch.zeros(2, D)), TypeError, "decoder: "),
        (lambda: VAE(nn.Identity(), give(torch.zeros(3, 4))).decode(torch.zeros(2, D)), ValueError, r"decoder: .*\[2"),
        (lambda: make_vae().fit_prior(binary(9, 4, 5), 2, seed=0.5), TypeError, "seed: "),
        (lambda: make_vae().fit_prior(binary(9, 4, 5), 2, progress=1), TypeError, "progress: "),
        (lambda: make_vae().fit_prior(binary(9, 4, 5), 2.0), TypeError, "n_components: "),
        (lambda: make_vae().log_likelihood([1.0], 3), TypeError, "x: "),
        (lambda: make_vae().log_likelihood(torch.full((2, 4, 5), 0.5), 3), ValueError, "x: "),
        (lambda: make_vae().log_likelihood(torch.zeros(2, 4, 5), 0), ValueError, "n_importance: "),
        (lambda: make_vae().log_likelihood(torch.zeros(2, 4, 5), 2.0), TypeError, "n_importance: "),
        (lambda: make_vae().log_likelihood(torch.zeros(2, 4, 5), 3, batch_size=0), ValueError, "batch_size: "),
        (lambda: make_vae().log_likelihood(torch.zeros(2, 4, 5), 3, proposal="q"), ValueError, "proposal: .*'prior'"),
        (lambda: make_vae().log_likelihood(torch.zeros(2, 4, 5), 3, proposal="prior"), ValueError, "dim: "),
        (lambda: make_vae()(torch.zeros(2, 4, 5, dtype=torch.int64)), TypeError, "x: .*int64"),
        (lambda: VAE(nn.Identity(), nn.Identity())(torch.zeros(2, D)), TypeError, "encoder: .*pair"),
        (
            lambda: VAE(give((torch.zeros(2, 3), torch.zeros(2, 4))), nn.Identity())(torch.zeros(2, 3)),
            ValueError,
            r"encoder: .*\[2, D\].*\(2, 3\) and \(2, 4\)",
        ),
        (
            lambda: VAE(give((torch.zeros(3, 3), torch.zeros(3, 3))), nn.Identity())(torch.zeros(2, 3)),
            ValueError,
            r"encoder: .*\[2, D\]",
        ),
        (
            lambda: VAE(Encoder(4), nn.Linear(D, 5))(torch.zeros(2, 4)),
            ValueError,
            r"decoder: .*\(4,\).*\(5,\)",
        ),
        (
            lambda: VAE(Encoder(4), nn.Linear(D, 4))(torch.zeros(2, 1, 4)),
            ValueError,
            r"decoder: .*\(1, 4\).*\(4,\)",
        ),
    ],
)
def test_errors_name_the_argument(make, error, message):
    with pytest.raises(error, match=rf"^{message}"):
        make()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("k", [1, 3])
def test_compiled_by_inductor_with_a_large_batch(k: int) -> None:
    """Inductor reuses the memory of one view of z before it has read another, so that there must be but one."""
    encoder = nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 20))
    decoder = nn.Sequential(nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 784))
    objective = fastvae.BetaTCVAE(beta=6, dataset_size=60_000, k=k)
    vae = fastvae.VAE(lambda x: encoder(x).chunk(2, -1), decoder, objective=objective)
    x = torch.rand(1024, 784).round()
    gradients = []
    for step in (lambda x: vae(x).loss, torch.compile(lambda x: vae(x).loss, fullgraph=True)):
        torch.manual_seed(1)
        gradients.append(torch.autograd.grad(step(x), [*encoder.parameters(), *decoder.parameters()]))
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-3, atol=1e-4 * float(eager.abs().max()))
