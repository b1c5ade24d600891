"""Likelihoods: against torch.distributions, constants included, and what they refuse."""

import math

import pytest
import torch
from support.helpers import draw, wrong
from torch import distributions as D

from fastvae.models.likelihoods import PIECE, REAL, Bernoulli, Binomial, Gaussian, make_likelihood
from fastvae.ops.checks import FLOATING

SHAPE = (7, 3, 5)


def test_bernoulli_is_torchs():
    logits = 5 * torch.randn(4, *SHAPE, dtype=torch.float64)
    x = torch.bernoulli(torch.full(SHAPE, 0.3, dtype=torch.float64))
    torch.testing.assert_close(Bernoulli().log_prob(x, logits), D.Bernoulli(logits=logits).log_prob(x))
    torch.testing.assert_close(Bernoulli().mean(logits), D.Bernoulli(logits=logits).mean)


def of_example(terms, x):
    """The sum over x's axes but the first."""
    return terms.flatten(terms.ndim - x.ndim + 1).sum(-1)


@pytest.mark.parametrize("dtype", FLOATING, ids=str)
@pytest.mark.parametrize("of_x", REAL, ids=str)
def test_bernoulli_of_an_example_is_the_sum_of_the_terms(of_x, dtype):
    """In the dtype of the terms, for x of any, gradients in the logits' dtype."""
    x, logits = (draw(*SHAPE, seed=1) > 0).to(of_x), (3 * draw(2, 4, *SHAPE, seed=2)).to(dtype).requires_grad_()
    ours = Bernoulli().example_log_prob(x, logits)
    terms = Bernoulli().log_prob(x, logits)
    torch.testing.assert_close(ours, of_example(terms, x), check_dtype=True)
    upstream = draw(*ours.shape, seed=3).to(ours)
    (expected,) = torch.autograd.grad(of_example(terms, x), logits, upstream, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(ours, logits, upstream)[0], expected)


def test_bernoulli_of_an_example_broadcasts_x():
    logits = draw(4, *SHAPE, seed=2)
    for shape in ((1, 3, 5), (7, 1, 5), (1, 1, 1), (3, 1)):
        x = (draw(*shape, seed=1) > 0).double()
        expected = of_example(Bernoulli().log_prob(x, logits), x)
        torch.testing.assert_close(Bernoulli().example_log_prob(x, logits), expected)


def test_bernoulli_of_an_example_has_the_terms_of_a_subclass():
    class Halved(Bernoulli):
        def log_prob(self, x, output):
            return super().log_prob(x, output) / 2

    class Counted(Bernoulli):
        def mean(self, output):
            return output

    x, logits = (draw(*SHAPE, seed=1) > 0).double(), draw(4, *SHAPE, seed=2)
    whole = of_example(Bernoulli().log_prob(x, logits), x)
    patched = Bernoulli()
    patched.log_prob = lambda x, output: Bernoulli().log_prob(x, output) / 4  # type: ignore[method-assign]
    for likelihood, factor in ((Halved(), 2), (Counted(), 1), (patched, 4)):
        torch.testing.assert_close(likelihood.example_log_prob(x, logits), whole / factor)


@pytest.mark.usefixtures("fresh_compiler")
def test_bernoulli_of_an_example_is_left_to_the_compiler():
    """The compiler sees the terms, which it fuses, and no op of the library's."""
    graphs = []

    def seen(graph, inputs):
        graphs.append(str(graph.code))
        return graph

    x, logits = (draw(*SHAPE, seed=1) > 0).double(), draw(4, *SHAPE, seed=2)
    compiled = torch.compile(Bernoulli().example_log_prob, fullgraph=True, backend=seen)
    torch.testing.assert_close(compiled(x, logits), Bernoulli().example_log_prob(x, logits))
    assert len(graphs) == 1
    assert "fastvae" not in graphs[0]


@pytest.mark.parametrize("n", [1, 16, 255])
def test_binomial_is_torchs_and_sums_to_one(n):
    logits = 3 * torch.randn(4, *SHAPE, dtype=torch.float64)
    x = torch.randint(n + 1, SHAPE).double()
    ours = Binomial(n)
    torch.testing.assert_close(ours.log_prob(x, logits), D.Binomial(n, logits=logits).log_prob(x))
    torch.testing.assert_close(ours.mean(logits), D.Binomial(n, logits=logits).mean)
    every_count = torch.arange(n + 1.0, dtype=torch.float64)
    total = ours.log_prob(every_count[:, None], logits.reshape(1, -1).expand(n + 1, -1)).logsumexp(0)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-10, rtol=0)


def test_binomial_of_one_is_bernoulli():
    logits, x = torch.randn(SHAPE, dtype=torch.float64), torch.randint(2, SHAPE).double()
    torch.testing.assert_close(Binomial(1).log_prob(x, logits), Bernoulli().log_prob(x, logits))


@pytest.mark.parametrize("n", [1, 16, 255, 1000])
def test_binomial_coefficients_are_rounded_once(n):
    """Binomial coefficients are rounded once: half an ulp of the largest is 2.4e-7, 7.6e-6 and 3.1e-5 for n = 16, 255
    and 1000. The module's dtype is none of theirs."""
    x = torch.arange(n + 1.0, dtype=torch.float64)
    exact = torch.tensor([math.log(math.comb(n, k)) for k in range(n + 1)], dtype=torch.float64)
    for likelihood in (Binomial(n), Binomial(n).half()):
        wide = likelihood.log_prob(x, torch.zeros_like(x)) + n * math.log(2)
        torch.testing.assert_close(wide, exact, rtol=1e-13, atol=1e-12)
        rounded = likelihood._log_choose(x.float()).double()
        torch.testing.assert_close(rounded, exact, rtol=2**-24 * 1.001, atol=2e-12)


def test_binomial_is_unbiased_in_float32():
    """The log p(x|z) of 8-bit images of 3,072 pixels has the rounding of a sum, and no error that all pixels share."""
    torch.manual_seed(0)
    x = torch.randint(256, (8, 3072)).double()
    logits = (torch.logit((x + 0.5) / 256) + 0.3 * torch.randn_like(x)).float()
    ours, exact = Binomial(255).log_prob(x.float(), logits), Binomial(255).log_prob(x, logits.double())
    assert (ours.double() - exact).sum(1).abs().max() < 3e-3  # float32's bias was 0.2


@pytest.mark.parametrize("n", [255, 2**40])
def test_binomial_gives_what_is_no_count_no_probability(n):
    x = torch.tensor([-1.0, 0.5, n * 2.0, 0.0, n], dtype=torch.float64)
    log_p = Binomial(n).log_prob(x, torch.zeros_like(x))
    torch.testing.assert_close(log_p[:3], torch.full((3,), -math.inf).double())
    torch.testing.assert_close(log_p[3:], torch.full((2,), -n * math.log(2)).double())


def test_binomial_under_transforms():
    x, logits = torch.randint(17, (6, 5)).float(), torch.randn(6, 5)
    expected = Binomial(16).log_prob(x, logits)
    torch.testing.assert_close(torch.vmap(Binomial(16).log_prob)(x, logits), expected)
    compiled = torch.compile(Binomial(16).log_prob, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, logits), expected)
    torch.testing.assert_close(Binomial(16).log_prob(x.half(), logits), expected)
    (gradient,) = torch.autograd.grad(Binomial(16).log_prob(x.requires_grad_(), logits).sum(), x)
    torch.testing.assert_close(gradient, logits)


@pytest.mark.parametrize("learned", [False, True])
def test_gaussian_has_its_constant(learned):
    mean, x = torch.randn(4, *SHAPE, dtype=torch.float64), torch.randn(SHAPE, dtype=torch.float64)
    ours = Gaussian(0.3, learned=learned, dtype=torch.float64)
    expected = D.Normal(mean, math.sqrt(0.3)).log_prob(x)
    torch.testing.assert_close(ours.log_prob(x, mean), expected)
    at_its_mean = ours.log_prob(x, x)
    torch.testing.assert_close(at_its_mean, torch.full_like(x, -0.5 * math.log(2 * math.pi * 0.3)))
    assert (len(list(ours.parameters())) == 1) == learned
    assert "log_variance" in ours.state_dict()
    assert repr(ours) == f"Gaussian(variance=0.3, learned={learned})"
    assert f"learned={learned}" in repr(ours.to("meta"))


def test_a_fixed_variance_is_not_rounded():
    x = torch.randn(5, dtype=torch.float64)
    expected = D.Normal(torch.zeros_like(x), math.sqrt(0.3)).log_prob(x)
    for ours in (Gaussian(0.3), Gaussian(0.3).double(), Gaussian(0.3).bfloat16().double()):
        torch.testing.assert_close(ours.log_prob(x, torch.zeros_like(x)), expected)


@pytest.mark.parametrize("learned", [False, True])
def test_a_variance_is_saved(learned):
    """A variance is saved as always, as `log_variance`, a float32 buffer in older checkpoints; learned or not."""
    saved = {"log_variance": torch.tensor(math.log(0.3))}
    for other in (False, True):
        ours = Gaussian(learned=other)
        ours.load_state_dict(saved)
        assert torch.as_tensor(ours.log_variance).item() == saved["log_variance"].item()
        again = Gaussian(learned=learned)
        again.load_state_dict(ours.state_dict())
        assert torch.as_tensor(again.log_variance).item() == saved["log_variance"].item()
    with pytest.raises(RuntimeError, match=r"Missing.*log_variance"):
        Gaussian(learned=learned).load_state_dict({})
    Gaussian(learned=learned).load_state_dict({}, strict=False)


def test_a_learned_variance_finds_the_datas():
    torch.manual_seed(0)
    x, ours = 0.2 * torch.randn(4000), Gaussian(learned=True)
    optimizer = torch.optim.LBFGS(ours.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        nell = -ours.log_prob(x, torch.zeros_like(x)).mean()
        nell.backward()
        return nell

    optimizer.step(loss)
    assert ours.log_variance.exp().item() == pytest.approx((x * x).mean().item(), rel=1e-3)


@pytest.mark.parametrize("likelihood", [Bernoulli(), Binomial(16), Gaussian(0.3)])
def test_samples_have_the_mean_and_the_entropy(likelihood):
    """Samples have the mean and the entropy to five standard errors, by torch's generator."""
    n = 40_000
    output = torch.tensor([-3.0, 0.2, 1.5]).expand(n, 3)
    torch.manual_seed(0)
    x = likelihood.sample(output)
    torch.manual_seed(0)
    assert torch.equal(x, likelihood.sample(output))
    likelihood.check(x)
    assert x.shape == (n, 3)
    error = 5 * x.std(0) / math.sqrt(n)
    assert ((x.mean(0) - likelihood.mean(output[0])).abs() < error).all()
    if likelihood.discrete:
        values = torch.arange(1.0 + getattr(likelihood, "total_count", 1))[:, None]
        log_p = likelihood.log_prob(values, output[: len(values)])
        entropy = -(log_p.exp() * log_p).sum(0)
    else:
        entropy = torch.full((3,), 0.5 * math.log(2 * math.pi * math.e * 0.3))
    log_p = likelihood.log_prob(x, output)
    assert ((log_p.mean(0) + entropy).abs() < 5 * log_p.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("likelihood", [Bernoulli(), Binomial(2), Gaussian()])
def test_half_precision_accumulates_in_float32(likelihood, dtype):
    x, output = torch.ones(SHAPE), torch.randn(SHAPE).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert likelihood.log_prob(x, output).dtype == expected
    assert likelihood.sample(output).dtype == expected


@pytest.mark.parametrize("bad", [0.5, -1.0, 2.0, math.nan, math.inf])
def test_bernoulli_refuses_what_is_not_binary(bad):
    Bernoulli().check(torch.tensor([0.0, 1.0]))
    with pytest.raises(ValueError, match=r"^x: .*'binomial'.*total_count.*'gaussian'.*torch\.bernoulli"):
        Bernoulli().check(torch.tensor([0.0, bad, 1.0]))


def binary_or_not(x):
    try:
        Bernoulli().check(x)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_no_number_but_0_and_1_passes(dtype):
    """The smallest and the largest numbers, the neighbours of 0 and 1, what is not finite; of small integers, all."""
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        steps = [info.eps / 2, info.eps, 4 * info.eps, 0.25]
        near = [info.smallest_normal * info.eps, info.smallest_normal, info.eps, info.max, math.inf, math.nan]
        others = [1 - steps[0], 1 + steps[1], 1 - steps[2], 1 + steps[3], *near, *(-x for x in near), -1.0, 2.0]
        allowed = [0.0, -0.0, 1.0]
    else:
        bits = 1 if dtype == torch.bool else torch.iinfo(dtype).bits
        low = 0 if dtype in (torch.bool, torch.uint8) else -(2 ** (bits - 1))
        all_of_them = range(low, low + 2**bits) if bits <= 8 else [low, low + 1, -1, 2, 2 ** (bits // 2), -low - 1]
        allowed, others = [0, 1], [x for x in all_of_them if x not in (0, 1)]
    assert binary_or_not(torch.tensor(allowed).to(dtype))
    for other in others:
        x = torch.tensor([other, other], dtype=torch.float64 if dtype.is_floating_point else torch.int64).to(dtype)
        assert not binary_or_not(x), other
        assert not binary_or_not(torch.cat((x.new_zeros(9), x, x.new_ones(9)))), other


@pytest.mark.parametrize("place", [0, PIECE - 1, PIECE, 2 * PIECE + 4])
def test_every_piece_is_looked_at(place):
    x = torch.ones(2 * PIECE + 5)
    assert binary_or_not(x)
    x[place] = 0.5
    assert not binary_or_not(x)


def test_binary_data_of_any_layout():
    x = (draw(6, 5, 4) > 0).float()
    wrong_one = x.clone()
    wrong_one[2, 3, 1] = 0.5
    for given, right in ((x, True), (wrong_one, False)):
        assert binary_or_not(given.mT) == right
        assert binary_or_not(given[:, 1::2]) == right
        assert binary_or_not(given.requires_grad_()) == right
    assert binary_or_not(wrong_one[:2])
    assert not binary_or_not(wrong_one[2:3].detach().expand(7, 5, 4))
    assert not binary_or_not(torch.tensor(0.5).expand(3))
    assert binary_or_not(torch.tensor(1.0))
    for empty in (torch.empty(0), torch.empty(3, 0, dtype=torch.int64), torch.empty(0, dtype=torch.bool)):
        assert binary_or_not(empty)


@pytest.mark.parametrize("bad", [0.5, -1.0, 17.0, math.nan, math.inf])
def test_binomial_refuses_what_is_no_count(bad):
    Binomial(16).check(torch.tensor([0.0, 16.0]))
    with pytest.raises(ValueError, match=r"^x: .*0 to 16.*total_count=16.*'gaussian'"):
        Binomial(16).check(torch.tensor([0.0, bad]))


@pytest.mark.parametrize("likelihood", [Bernoulli(), Binomial(1), Gaussian()])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_binary_data_of_any_dtype(likelihood, dtype):
    x, output = torch.tensor([0, 1, 1]), torch.randn(3)
    likelihood.check(x.to(dtype))
    assert torch.equal(likelihood.log_prob(x.to(dtype), output), likelihood.log_prob(x.float(), output))


@pytest.mark.parametrize(
    ("make", "error", "name"),
    [
        (lambda: make_likelihood("poisson"), ValueError, "likelihood"),
        (lambda: make_likelihood("binomial"), TypeError, "total_count"),
        (lambda: make_likelihood(Bernoulli(), total_count=3), TypeError, "total_count"),
        (lambda: Binomial(0), ValueError, "total_count"),
        (lambda: Binomial(wrong(2.5)), TypeError, "total_count"),
        (lambda: Gaussian(0.0), ValueError, "variance"),
        (lambda: Gaussian(math.inf), ValueError, "variance"),
        (lambda: Gaussian(wrong("1")), TypeError, "variance"),
        (lambda: Gaussian(10**400), ValueError, "variance"),
        (lambda: Gaussian(learned=wrong(1)), TypeError, "learned"),
        (lambda: Binomial(2).log_prob(wrong([1.0]), torch.zeros(1)), TypeError, "x"),
        (lambda: Bernoulli().log_prob(torch.zeros(1), wrong([1.0])), TypeError, "output"),
        (lambda: Bernoulli().log_prob(torch.zeros(3), torch.zeros(2)), ValueError, "x"),
        (lambda: Gaussian().log_prob(torch.zeros(4, 3), torch.zeros(3)), ValueError, "x"),
        (lambda: Bernoulli().example_log_prob(torch.zeros(1), wrong([1.0])), TypeError, "output"),
        (lambda: Bernoulli().example_log_prob(torch.zeros(3), torch.zeros(2)), ValueError, "x"),
        (lambda: Bernoulli().example_log_prob(torch.zeros(4, 3), torch.zeros(3)), ValueError, "x"),
        (lambda: Bernoulli().example_log_prob(torch.zeros(()), torch.zeros(3)), ValueError, "x"),
        (lambda: Bernoulli().example_log_prob(torch.zeros(2, device="meta"), torch.zeros(2)), ValueError, "x"),
        *((lambda o=o: o.check([1.0]), TypeError, "x") for o in (Bernoulli(), Binomial(2), Gaussian())),
        *((lambda o=o: o.check(torch.eye(2).to_sparse()), TypeError, "x") for o in (Bernoulli(), Binomial(2))),
        *((lambda o=o: o.mean(1.0), TypeError, "output") for o in (Bernoulli(), Binomial(2), Gaussian())),
        *((lambda o=o: o.sample(1.0), TypeError, "output") for o in (Bernoulli(), Binomial(2), Gaussian())),
        *((lambda o=o: o.sample(torch.tensor([math.nan])), ValueError, "output") for o in (Bernoulli(), Binomial(2))),
        (lambda: Gaussian().log_prob(torch.zeros(2, device="meta"), torch.zeros(2)), ValueError, "x"),
        (lambda: Binomial(2).check(torch.zeros(2, dtype=torch.complex64)), TypeError, "x"),
    ],
)
def test_errors_name_the_argument(make, error, name):
    with pytest.raises(error, match=rf"^{name}: "):
        make()
