"""torch.vmap: random numbers by its `randomness`, one call of a kernel for a whole batch, gradients of each example."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Target
from support.helpers import draw, tensors
from support.ops import OPS, op_named
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import fastvae
from fastvae.backends import backend_for


def one_sample(mu: Tensor, logvar: Tensor) -> Tensor:
    return fastvae.reparameterize(mu, logvar)


def noise(randomness: str, n: int = 64, function: Callable[..., Tensor] = one_sample) -> Tensor:
    zeros = torch.zeros(n, 8, 3)
    return vmap(function, randomness=randomness)(zeros, zeros)


def test_random_numbers_have_to_be_allowed(backend: Target) -> None:
    batch, one = torch.zeros(4, 3), torch.zeros(3)
    for in_dims, inputs in ((0, (batch, batch)), ((0, None), (batch, one)), ((None, 0), (one, batch))):
        with pytest.raises(RuntimeError, match="randomness error mode"):
            vmap(one_sample, in_dims=in_dims)(*inputs)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(lambda x: x + one_sample(torch.zeros(3), torch.zeros(3)))(torch.zeros(4, 3))


def test_the_seed_is_that_of_a_call_outside(backend: Target) -> None:
    zeros = torch.zeros(2, 3)
    for n in range(8):
        torch.manual_seed(n)
        outside = one_sample(zeros, zeros)
        torch.manual_seed(n)
        assert torch.equal(vmap(one_sample, in_dims=(0, None), randomness="same")(zeros[None], zeros)[0], outside)
        torch.manual_seed(n)
        assert torch.equal(grad(lambda x: (one_sample(x, zeros) ** 2).sum() / 2)(zeros), outside)


def test_the_same_noise_for_all(backend: Target) -> None:
    torch.manual_seed(0)
    z = noise("same")
    assert (z == z[0]).all()
    torch.manual_seed(0)
    assert torch.equal(noise("same"), z)
    assert not torch.equal(noise("same"), z)
    assert len(z[0].unique()) == 24


def test_noise_of_its_own_for_each(backend: Target) -> None:
    torch.manual_seed(0)
    z = noise("different")
    assert len(z.unique()) == z.numel()
    assert abs(z.mean()) < 5 / z.numel() ** 0.5
    assert abs(z.var() - 1) < 5 * (2 / z.numel()) ** 0.5
    torch.manual_seed(0)
    assert torch.equal(noise("different"), z)
    both = noise("different", 4, lambda mu, logvar: one_sample(mu, logvar) - one_sample(mu, logvar))
    assert both.all()


def test_a_seed_of_the_caller_is_the_same_for_all(backend: Target) -> None:
    mu, logvar = draw(5, 4, 3, seed=1), draw(5, 4, 3, seed=2)
    one_by_one = [fastvae.reparameterize(mu[i], logvar[i], 2, seed=3) for i in range(5)]
    for randomness in ("error", "different"):
        z = vmap(lambda m, v: fastvae.reparameterize(m, v, 2, seed=3), randomness=randomness)(mu, logvar)
        assert torch.equal(z, torch.stack(one_by_one))


@pytest.mark.parametrize("outer", ["same", "different"])
@pytest.mark.parametrize("inner", ["same", "different"])
def test_randomness_within_randomness(backend: Target, inner: str, outer: str) -> None:
    zeros = torch.zeros(4, 5, 3)
    z = vmap(vmap(one_sample, randomness=inner), randomness=outer)(zeros, zeros)  # [outer, inner, 3]
    assert (z[0] == z[1]).all() == (outer == "same")
    assert (z[:, 0] == z[:, 1]).all() == (inner == "same")
    assert len(z.unique()) == 3 * (4 if outer == "different" else 1) * (5 if inner == "different" else 1)


@pytest.mark.parametrize("n_samples", [None, 2])
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradients_see_the_noise_of_the_samples(backend: Target, randomness: str, n_samples: int | None) -> None:
    """Derivatives of z are 1 by mu, and (z - mu) / 2 by logvar: within vmap, through it, and in forward mode."""
    mu, logvar = draw(5, 4, 3, seed=1), draw(5, 4, 3, seed=2)

    def z_of(mu: Tensor, logvar: Tensor) -> Tensor:
        return fastvae.reparameterize(mu, logvar, n_samples)

    def total(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
        z = z_of(mu, logvar)
        return z.sum(), z

    def expected(z: Tensor) -> Tensor:
        z = z if n_samples is None else z.movedim(1, 0)
        d = (z - mu) / 2
        return d if n_samples is None else d.sum(0)

    gradients, z = vmap(grad(total, argnums=(0, 1), has_aux=True), randomness=randomness)(mu, logvar)
    assert (gradients[0] == (n_samples or 1)).all()
    torch.testing.assert_close(gradients[1], expected(z))

    leaves = [x.clone().requires_grad_() for x in (mu, logvar)]
    z = vmap(z_of, randomness=randomness)(*leaves)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), leaves)[1], expected(z.detach()))

    def along_logvar(mu: Tensor, logvar: Tensor) -> Any:
        return torch.func.jvp(lambda v: z_of(mu, v), (logvar,), (torch.ones_like(logvar),))

    z, tangent = vmap(along_logvar, randomness=randomness)(mu, logvar)
    torch.testing.assert_close(tangent if n_samples is None else tangent.sum(1), expected(z))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_randomness_where_compiled(compiler: str) -> None:
    zeros = torch.zeros(6, 8, 3)
    for randomness, kinds in (("same", 24), ("different", 6 * 24)):
        torch._dynamo.reset()
        z = torch.compile(vmap(one_sample, randomness=randomness), backend=compiler, fullgraph=True)(zeros, zeros)
        assert len(z.unique()) == kinds
    torch._dynamo.reset()
    with pytest.raises(Exception, match="randomness error mode"):
        torch.compile(vmap(one_sample), backend=compiler, fullgraph=True)(zeros, zeros)


def counted(names: list[str], like: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of these functions of the backend, in the order in which they will have been called."""
    module, calls = backend_for(like.device), []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    for name in names:
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    return calls


@pytest.mark.parametrize("reduction", ["none", "sample", "dim", "sum", "mean", "batchmean"])
@pytest.mark.parametrize("prior", ["none", "shared", "of each row", "of each problem"])
def test_the_kl_of_a_batch_is_one_call(
    backend: Target, reduction: str, prior: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"none": None, "shared": (3,), "of each row": (4, 3), "of each problem": (6, 3)}[prior]
    mu, logvar = draw(6, 4, 3, seed=1), draw(6, 4, 3, seed=2)
    priors = () if shape is None else (draw(*shape, seed=3), draw(*shape, seed=4))
    in_dims = (0, 0, *[0 if prior == "of each problem" else None for _ in priors])

    def kl(*x: Tensor) -> Tensor:
        return fastvae.kl_gauss(*x, reduction=reduction)

    def loss(*x: Tensor) -> tuple[Tensor, Tensor]:
        value = kl(*x)
        return value.cos().sum(), value

    calls = counted(["kl_gauss", "kl_gauss_backward"], mu, monkeypatch)
    places = tuple(range(2 + len(priors)))
    gradients, values = vmap(grad(loss, argnums=places, has_aux=True), in_dims=in_dims)(mu, logvar, *priors)
    assert calls == ["kl_gauss", "kl_gauss_backward"]
    for i in range(6):
        one = [x if dim is None else x[i] for x, dim in zip((mu, logvar, *priors), in_dims, strict=True)]
        expected, value = grad(loss, argnums=places, has_aux=True)(*one)
        torch.testing.assert_close(values[i], value)
        for a, b in zip(gradients, expected, strict=True):
            torch.testing.assert_close(a[i], b)


def test_samples_of_their_own_are_one_call(backend: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    mu = draw(50, 3, seed=1)
    calls = counted(["sample_gauss", "sample_gauss_backward"], mu, monkeypatch)
    vmap(grad(lambda mu: one_sample(mu, mu).sin().sum()), randomness="different")(mu)
    assert calls == ["sample_gauss", "sample_gauss_backward"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_a_priors_gradient_once(backend: Target, dtype: torch.dtype) -> None:
    mu, prior = (draw(2, 300, 3, seed=1) + 2).to(dtype), draw(3, seed=2).to(dtype)

    def loss(mu: Tensor, prior: Tensor) -> Tensor:
        return fastvae.kl_gauss(mu, torch.zeros_like(mu), prior, reduction="sum")

    found = vmap(grad(loss, argnums=1), in_dims=(0, None))(mu, prior)
    expected = (prior.double() - mu.double()).sum(1)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("name", OPS)
def test_an_empty_batch(backend: Target, name: str) -> None:
    """An empty batch, such as one drawn example by example may be, has empty results and gradients of 0."""
    op = op_named(name)
    inputs = {key: x.detach()[None][:0] for key, x in op.inputs.items()}
    one = op.fast(**op.inputs)
    for randomness in ("same", "different"):
        found = vmap(lambda x: op.fast(**x), randomness=randomness)(inputs)
        for a, b in zip(tensors(found), tensors(one), strict=True):
            assert (a.shape, a.dtype) == ((0, *b.shape), b.dtype)
    leaf = torch.ones(3, dtype=torch.float64, requires_grad=True)
    z = vmap(one_sample, in_dims=(0, None), randomness="different")(torch.zeros(0, 3, dtype=torch.float64), leaf)
    assert z.shape == (0, 3)
    assert not torch.autograd.grad(z.sum(), leaf)[0].any()


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_chunks_of_a_jacobian(backend: Target, chunk_size: int | None) -> None:
    z, mu, logvar = draw(5, 3, seed=1), draw(4, 3, seed=2), draw(4, 3, seed=3)
    found = jacrev(fastvae.agg_log_prob, chunk_size=chunk_size)(z, mu, logvar)
    assert not found[~torch.eye(5, dtype=torch.bool)].any()  # each row is of one sample
    scores = grad(lambda z: fastvae.agg_log_prob(z, mu, logvar).sum())(z)
    torch.testing.assert_close(found.diagonal(dim1=0, dim2=1).T, scores)


def test_gradients_of_each_example_of_a_vae(backend: Target) -> None:
    """Gradients of each example, as differentially private training clips them."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(6, 4), nn.Linear(2, 6)
    vae = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    parameters = {name: p.detach() for name, p in vae.named_parameters()}
    x = torch.randn(7, 6)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        class Step(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder, self.decoder = encoder, decoder

            def forward(self, x: Tensor) -> Tensor:
                mu, logvar = self.encoder(x[None]).chunk(2, -1)
                z = fastvae.reparameterize(mu, logvar, seed=3)
                return (self.decoder(z) - x).square().sum() + fastvae.kl_gauss(mu, logvar)

        result: Any = functional_call(Step(), parameters, (x,))
        return result

    found = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for i in range(len(x)):
        for name, gradient in grad(loss)(parameters, x[i]).items():
            torch.testing.assert_close(found[name][i], gradient)
