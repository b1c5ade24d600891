"""Evaluation on a whole data set: streaming against memory, active units, the decoder's information."""

import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Target
from support.helpers import LOG_2PI, draw, wrong
from test_kl_decomposition import ANCHORS, DATA, Correlated, Largest, mixing
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae import (
    VAE,
    KLDecomposition,
    active_units,
    decoder_mutual_information,
    kl_decomposition,
    kl_decomposition_dataset,
)
from fastvae.models.likelihoods import Binomial, Gaussian

N, D = 103, 5


@pytest.fixture
def posteriors(backend: Target) -> tuple[Tensor, Tensor]:
    return draw(N, D, seed=1), draw(N, D, seed=2) - 1


@pytest.fixture
def mapped(posteriors: tuple[Tensor, Tensor], tmp_path: Path) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """The posteriors in memory-mapped files that cannot be written to."""

    def of(dtype: str) -> tuple[np.ndarray, np.ndarray]:
        for name, x in zip(("mu", "logvar"), posteriors, strict=True):
            np.save(tmp_path / f"{name}.npy", x.numpy(force=True).astype(dtype))
        return tuple(np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("mu", "logvar"))  # type: ignore

    return of


def in_memory(
    posteriors: tuple[Tensor, Tensor], L: int = 1, rows: Tensor | None = None, seed: int = 0, **options: Any
) -> KLDecomposition:
    mu, logvar = posteriors
    rows = torch.arange(len(mu)) if rows is None else rows
    z = fastvae.reparameterize(mu[rows], logvar[rows], L, seed=seed)
    return kl_decomposition(z.flatten(0, 1), mu, logvar, own=rows.repeat(L), **options)


def assert_equal(left: KLDecomposition, right: KLDecomposition, tolerance: float = 1e-12) -> None:
    assert left.estimator == right.estimator
    for a, b in zip(left[:-1], right[:-1], strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


# kl_decomposition_dataset


@pytest.mark.parametrize("batch_size", [1, 10, 103, 4096])
def test_chunks_give_what_one_pass_does(backend: Target, posteriors: tuple[Tensor, Tensor], batch_size: int) -> None:
    populations = (1, None), (2, torch.tensor([7, 102, 7, 0])), (3, None)
    for L, rows in populations[: 2 if backend.slow else 3]:
        streamed = kl_decomposition_dataset(posteriors, n_samples=L, rows=rows, batch_size=batch_size, seed=5)
        assert_equal(streamed, in_memory(posteriors, L, rows, seed=5))
        assert streamed.mi.dtype == torch.float64


def test_as_many_rows(posteriors: tuple[Tensor, Tensor]) -> None:
    everything = kl_decomposition_dataset(posteriors, rows=N)  # in order
    assert_equal(everything, kl_decomposition_dataset(posteriors))
    some = [kl_decomposition_dataset(posteriors, rows=20, seed=seed) for seed in (3, 3, 4)]
    assert_equal(some[0], some[1], 0.0)
    assert some[0].mi != some[2].mi
    many = [kl_decomposition_dataset(posteriors, rows=60, seed=seed, n_samples=4).mi for seed in range(20)]
    mean, error = torch.stack(many).mean(), torch.stack(many).std() / math.sqrt(20)
    assert abs(mean - kl_decomposition_dataset(posteriors, n_samples=2000).mi) < 4 * error + 0.01


def test_priors_and_the_closed_form(posteriors: tuple[Tensor, Tensor]) -> None:
    for options in ({"prior": Correlated(mixing(D))}, {"analytic_conditional": True}):
        streamed = kl_decomposition_dataset(posteriors, n_samples=2, batch_size=40, **options)
        assert_equal(streamed, in_memory(posteriors, 2, **options))
        assert not any(t.requires_grad for t in streamed[:-1])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5), ("float16", 1e-5)])
def test_memory_mapped_arrays(
    posteriors: tuple[Tensor, Tensor], mapped: Callable[[str], Any], dtype: str, tolerance: float
) -> None:
    arrays = mapped(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as torch's on arrays that cannot be written to
        streamed = kl_decomposition_dataset(arrays, rows=50, batch_size=17, device=posteriors[0].device)
    wide = np.float64 if dtype == "float64" else np.float32
    tensors = tuple(torch.from_numpy(x.astype(wide)).to(posteriors[0].device) for x in arrays)
    assert_equal(streamed, kl_decomposition_dataset(tensors, rows=50), tolerance)


def test_arrays_of_another_byte_order_and_of_odd_strides() -> None:
    mu, logvar = draw(N, D, seed=1).numpy(force=True), draw(N, D, seed=2).numpy(force=True)
    expected = kl_decomposition_dataset((mu, logvar), rows=20)
    for odd in (lambda x: x.astype(">f8"), lambda x: x[::-1, ::-1].copy()[::-1, ::-1], np.asfortranarray):
        assert_equal(kl_decomposition_dataset((odd(mu), odd(logvar)), rows=20), expected, 0.0)
        batches = [(odd(mu)[:50], odd(logvar)[:50]), (odd(mu)[50:], odd(logvar)[50:])]
        assert_equal(kl_decomposition_dataset(batches, rows=20), expected, 0.0)
    assert_equal(kl_decomposition_dataset((mu, logvar), rows=20, batch_size=2**63 - 1), expected, 0.0)


def test_batches_of_an_encoder(posteriors: tuple[Tensor, Tensor]) -> None:
    x = torch.cat(posteriors, 1)
    calls = []

    def encoder(x: Tensor) -> tuple[Tensor, ...]:
        calls.append(len(x))
        return x.chunk(2, 1)

    expected = kl_decomposition_dataset(posteriors, rows=40, batch_size=30)
    labelled = DataLoader(TensorDataset(x, torch.arange(N)), batch_size=20)
    once = (part for part in x.split(20))
    for data in (x, x.split(20), labelled, once):
        calls.clear()
        assert_equal(kl_decomposition_dataset(encoder, data, rows=40, batch_size=30), expected, 1e-15)
        assert sum(calls) == N  # each example is encoded once
        assert max(calls) <= 30
    pairs = zip(*(p.split(20) for p in posteriors), strict=True)
    assert_equal(kl_decomposition_dataset(pairs, rows=40), expected)
    arrays = (part.numpy(force=True) for part in x.split(20))
    assert_equal(kl_decomposition_dataset((np.split(a, 2, 1) for a in arrays), rows=40, device=x.device), expected)
    single = kl_decomposition_dataset(encoder, x.float(), rows=40)
    assert_equal(single, expected, 1e-5)


def test_an_array_of_inputs_is_sliced(posteriors: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    """An array, also one mapped from a read-only file: the encoder gets tensors, `batch_size` rows at a time."""
    x = torch.cat(posteriors, 1)
    np.save(tmp_path / "x.npy", x.numpy(force=True))
    mapped, sizes = np.load(tmp_path / "x.npy", mmap_mode="r"), []

    def encoder(x: Tensor) -> tuple[Tensor, ...]:
        sizes.append(len(x))
        return x.chunk(2, 1)

    expected = kl_decomposition_dataset(posteriors, rows=40)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (mapped, np.array(mapped), (part for part in np.array_split(mapped, 4))):
            sizes.clear()
            assert_equal(kl_decomposition_dataset(encoder, data, rows=40, batch_size=40, device=x.device), expected)
            assert sizes in ([40, 40, 23], [26, 26, 26, 25])


def test_a_vae_encodes(backend: Target) -> None:
    """A VAE is evaluated with its own prior, an encoder with N(0, I)."""
    vae = VAE(lambda x: (x[:, :2], x[:, 2:4] - 3), nn.Linear(2, 6), prior=fastvae.MixturePrior(3, 2))
    x = (draw(50, 6) > 0).float()
    loader = DataLoader(TensorDataset(x), 16)
    own, normal = (kl_decomposition_dataset(vae.encode(x), prior=prior) for prior in (vae.prior, None))
    assert_equal(kl_decomposition_dataset(vae, loader), own, 1e-5)
    assert_equal(kl_decomposition_dataset(vae.encode, loader), normal, 1e-5)
    assert_equal(kl_decomposition_dataset(vae, loader, prior=fastvae.StandardNormal(2)), normal, 1e-5)
    assert abs(own.agg_kl - normal.agg_kl) > 0.01


def test_the_other_order_is_seen() -> None:
    x, encoder = torch.zeros(4, 3), nn.Linear(3, 6)
    for source, data in ((x, encoder), (DataLoader(TensorDataset(x)), VAE(encoder, encoder)), ([x], lambda x: (x, x))):
        with pytest.raises(
            TypeError, match=r"^source: expected a VAE, or an encoder .*got \w+; as data is a \w+, give it first$"
        ):
            kl_decomposition_dataset(source, data)


def test_anchors(backend: Target) -> None:
    """The population's values, up to five standard errors of the difference: the anchors are of one sample of each
    posterior, these of 8 others, and the closed KL of none."""
    with np.load(DATA / "anchors.npz") as archive:
        mu, logvar, z, log_qz, log_qzd = (archive[n] for n in ("mu", "logvar", "z", "full_log_qz", "full_log_qzd"))
    L, device = 8, torch.get_default_device()
    terms = kl_decomposition_dataset((mu, logvar), n_samples=L, batch_size=500, device=device)
    conditional = -0.5 * ((z - mu) ** 2 / np.exp(logvar) + logvar + LOG_2PI).sum(1)
    log_pz = -0.5 * (z**2 + LOG_2PI).sum(1)
    of_sample = {"mi": conditional - log_qz, "entropy": -log_qz, "tc": log_qz - log_qzd.sum(1)}
    for name, values in of_sample.items():
        assert values.mean() == pytest.approx(ANCHORS["full"][name])
        error = values.std() * math.sqrt((1 + 1 / L) / len(values))
        assert getattr(terms, name).item() == pytest.approx(values.mean(), abs=5 * error)
    error = (conditional - log_pz).std() / math.sqrt(L * len(z))
    assert terms.kl.item() == pytest.approx(ANCHORS["kl_mean"], abs=5 * error)
    assert terms.saturation.item() == pytest.approx(math.exp(terms.mi) / 1536)


def test_memory_is_bounded(backend: Target) -> None:
    """Memory is bounded by chunk and samples, not by the number of posteriors or of pairs."""
    if backend.backend == "reference":
        pytest.skip("it computes in chunks of up to 64 MiB")
    n = 20_000
    mu = np.lib.stride_tricks.as_strided(np.arange(n + 2, dtype=np.float32) / n, (n, 3), (4, 4))
    logvar = np.broadcast_to(np.float32(-9.0), (n, 3))
    with Largest() as largest:
        kl_decomposition_dataset((mu, logvar), rows=100, batch_size=500, device=torch.get_default_device())
    assert largest.elements <= 500 * 3


@pytest.mark.parametrize("installed", [True, False])
def test_progress(
    posteriors: tuple[Tensor, Tensor], installed: bool, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    expected = kl_decomposition_dataset(posteriors, batch_size=10)
    assert capsys.readouterr().err == ""
    pairs = [p.split(20) for p in posteriors]
    shown = kl_decomposition_dataset(zip(*pairs, strict=True), batch_size=10, progress=True)
    assert_equal(shown, expected, 0.0)
    text = capsys.readouterr().err
    assert "encoding" in text
    assert ("11/11" if installed else "columns: 11 of 11\n") in text


def test_a_saturated_mi_is_warned_of(posteriors: tuple[Tensor, Tensor]) -> None:
    mu, logvar = posteriors
    with pytest.warns(UserWarning, match=r"^mi: 4\.6\d nats .*log 103 = 4\.63") as caught:
        kl_decomposition_dataset((10 * mu, logvar - 9))
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kl_decomposition_dataset((0.1 * mu, logvar * 0))
        for few in (1, 2, 3):  # exp(0) is a large share of these
            kl_decomposition_dataset((0 * mu[:few], 0 * logvar[:few]))


def broken(batch: Any) -> Iterator[Any]:
    yield torch.zeros(4, 3), torch.zeros(4, 3)
    yield batch


@pytest.mark.parametrize(
    ("error", "named", "source", "options"),
    [
        (TypeError, "source", 3, {}),
        (TypeError, "source", torch.zeros(4, 3), {}),
        (TypeError, "source", np.zeros((4, 3)), {}),
        (TypeError, "data", lambda x: (x, x), {"data": 3}),
        (TypeError, "source", lambda x: x, {"data": torch.zeros(4, 3)}),
        (TypeError, "source", broken(torch.zeros(4, 3)), {}),
        (TypeError, "source", [{"x": torch.zeros(4, 3)}], {}),
        (TypeError, "data", lambda x: (x, x), {"data": [{"x": torch.zeros(4, 3)}]}),
        (TypeError, "data", lambda x: (x, x), {"data": {"x": torch.zeros(4, 3)}}),
        (TypeError, "data", lambda x: (x, x), {"data": [()]}),
        (TypeError, "data", lambda x: (x, x), {"data": np.full((4, 3), "x")}),
        (TypeError, "source", (np.full((4, 3), None), np.zeros((4, 3))), {}),
        (TypeError, "source", [(np.zeros((4, 3), np.longdouble), np.zeros((4, 3)))], {}),
        (ValueError, "source", broken((torch.zeros(4, 2), torch.zeros(4, 2))), {}),
        (ValueError, "logvar", broken((torch.zeros(4, 3), torch.zeros(4, 2))), {}),
        (TypeError, "mu", broken(([0.0], [0.0])), {}),
        (ValueError, "source", [], {}),
        (ValueError, "source", (torch.zeros(4, 3), torch.zeros(4, 2)), {}),
        (ValueError, "source", (torch.zeros(3), torch.zeros(3)), {}),
        (ValueError, "source", (torch.zeros(0, 3), torch.zeros(0, 3)), {}),
        (TypeError, "mu", (torch.zeros(4, 3).long(), torch.zeros(4, 3)), {}),
        (TypeError, "logvar", (np.zeros((4, 3)), np.zeros((4, 3), np.int32)), {}),
        (TypeError, "source", 3, {"data": [torch.zeros(4, 3)]}),
        (TypeError, "source", (torch.zeros(4, 3), torch.zeros(4, 3)), {"data": torch.zeros(4, 3)}),
        (TypeError, "source", fastvae.VAE, {"data": torch.zeros(4, 3)}),
        (TypeError, "source", "vae", {}),
        (ValueError, "data", lambda x: (x, x), {"data": []}),
        (ValueError, "data", lambda x: (x, x), {}),
        (ValueError, "data", nn.Sequential(), {}),
        (ValueError, "data", VAE(nn.Identity(), nn.Identity()), {}),
        (TypeError, "n_samples", None, {"n_samples": 1.5}),
        (ValueError, "n_samples", None, {"n_samples": 0}),
        (ValueError, "batch_size", None, {"batch_size": 0}),
        (ValueError, "rows", None, {"rows": 0}),
        (ValueError, "rows", None, {"rows": 5}),
        (TypeError, "rows", None, {"rows": 2.5}),
        (TypeError, "rows", None, {"rows": torch.ones(4).bool()}),
        (ValueError, "rows", None, {"rows": torch.tensor([0, 4])}),
        (ValueError, "rows", None, {"rows": torch.tensor([-1])}),
        (TypeError, "prior", None, {"prior": 1.0}),
        (TypeError, "seed", None, {"seed": 1.5}),
        (ValueError, "seed", None, {"seed": -(2**63) - 1}),
        (ValueError, "seed", None, {"seed": 2**64}),
        (ValueError, "n_samples", None, {"n_samples": 2**62}),
        (ValueError, "n_samples", None, {"n_samples": 2**39}),
        (ValueError, "rows", None, {"rows": 2**62}),
        (ValueError, "rows", None, {"rows": torch.arange(3, device="meta")}),
        (TypeError, "rows", None, {"rows": torch.arange(3).to_sparse()}),
        (TypeError, "analytic_conditional", None, {"analytic_conditional": "no"}),
        (TypeError, "progress", None, {"progress": 1}),
        (ValueError, "method", None, {"method": np.array(["auto", "table"])}),
        (ValueError, "device", None, {"device": "gpu"}),
        (ValueError, "device", None, {"device": "meta"}),
        (ValueError, "device", None, {"device": 2**70}),
        (TypeError, "device", None, {"device": 1.5}),
        (ValueError, "mu", (torch.zeros(4, 3, device="meta"), torch.zeros(4, 3)), {}),
        (TypeError, "logvar", (torch.zeros(4, 3), torch.zeros(4, 3).to_sparse()), {}),
        (ValueError, "source", (torch.zeros(4, 0), torch.zeros(4, 0)), {}),
        (ValueError, "source", [(torch.zeros(4, 0), torch.zeros(4, 0))], {}),
        (TypeError, "source", (np.ma.masked_array(np.zeros((4, 3)), True), np.zeros((4, 3))), {}),
        (ValueError, "data", lambda x: (x, x), {"data": torch.zeros(())}),
        (ValueError, "data", lambda x: (x, x), {"data": torch.zeros(4, 3, device="meta")}),
        (TypeError, "data", lambda x: (x, x), {"data": torch.zeros(4, 3).to_sparse()}),
    ],
)
def test_errors_of_the_data_set(error: type[Exception], named: str, source: Any, options: dict[str, Any]) -> None:
    source = (torch.zeros(4, 3), torch.zeros(4, 3)) if source is None else source
    with pytest.raises(error, match=rf"^{named}: expected"):
        kl_decomposition_dataset(source, **options)


@pytest.mark.parametrize(
    ("named", "wrong"),
    [("prior", 1.0), ("prior", fastvae.StandardNormal), ("seed", 2**64), ("rows", 0), ("rows", torch.tensor([-1]))],
    ids=str,
)
def test_arguments_are_checked_before_anything_is_encoded(named: str, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=rf"^{named}: expected"):
        kl_decomposition_dataset(lambda x: pytest.fail("encoded"), broken(None), **{named: wrong})


# active_units


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_active_units(dtype: torch.dtype) -> None:
    scale = torch.tensor([0.0, 0.05, 0.2, 1.0, 30.0])
    mu = (scale * draw(500, 5) + torch.tensor([100.0, 0.0, 0.0, -7.0, 0.0])).to(dtype).requires_grad_()
    posteriors = mu, torch.zeros_like(mu)
    active = active_units(posteriors)
    assert active.dtype == torch.bool
    assert active.tolist() == [False, False, True, True, True]
    assert active_units(posteriors, threshold=0.5).tolist() == [False, False, False, True, True]
    assert active_units(posteriors, threshold=0, batch_size=7).tolist() == [False, True, True, True, True]
    encoded = active_units(lambda x: (x, torch.zeros_like(x)), mu.detach().split(99))
    assert encoded.tolist() == active.tolist()


@pytest.mark.parametrize(
    ("error", "named", "mu", "threshold"),
    [
        (TypeError, "mu", torch.zeros(4, 3).long(), 0.01),
        (ValueError, "source", torch.zeros(1, 3), 0.01),
        (ValueError, "source", torch.zeros(4), 0.01),
        (ValueError, "threshold", torch.zeros(4, 3), -1.0),
        (TypeError, "threshold", torch.zeros(4, 3), "1"),
        (ValueError, "threshold", torch.zeros(4, 3), 10**400),
        (ValueError, "source", torch.full((4, 3), math.nan), 0.01),
        (ValueError, "mu", torch.zeros(4, 3, device="meta"), 0.01),
    ],
)
def test_errors_of_active_units(error: type[Exception], named: str, mu: Tensor, threshold: Any) -> None:
    with pytest.raises(error, match=rf"^{named}: expected"):
        active_units((mu, mu), threshold=threshold)
    with pytest.raises(TypeError, match=r"^source: expected a pair"):
        active_units(mu)


# decoder_mutual_information


def linear_gaussian(s: float, wrong: float = 0.0) -> tuple[VAE, float]:
    """x = W z + s·noise with the exact posterior, `wrong` off in logvar, and its I_dec in nats. One latent."""
    weight = torch.tensor([[1.0], [-0.5], [2.0]]).double()
    precision = 1 + (weight**2).sum().item() / s**2

    def encoder(x: Tensor) -> tuple[Tensor, Tensor]:
        mu = x @ weight / (s**2 * precision)
        return mu, torch.full_like(mu, wrong - math.log(precision))

    decoder = nn.Linear(1, 3).double()
    decoder.weight.data, decoder.bias.data = weight, torch.zeros(3).double()
    vae = VAE(encoder, decoder, likelihood=Gaussian(s**2).double(), prior=fastvae.StandardNormal(1))
    return vae.eval(), 0.5 * math.log(precision)


@pytest.mark.parametrize(("s", "wrong"), [(0.3, 0.0), (0.3, 0.5), (2.0, 0.0)])
def test_mutual_information_of_a_linear_decoder(backend: Target, s: float, wrong: float) -> None:
    vae, exact = linear_gaussian(s, wrong)
    n = 200 if backend.slow else 2000
    got = decoder_mutual_information(vae, n_prior=n, n_importance=200 if wrong else 8, batch_size=10_000)
    assert abs(got.mi - exact) < 4 * got.standard_error + (0.01 if wrong else 0)
    assert 0 < got.standard_error < 2.2 / math.sqrt(n)
    assert got.ess.shape == (n,)


def test_mutual_information_by_the_prior(backend: Target) -> None:
    vae, exact = linear_gaussian(1.0)
    got = decoder_mutual_information(vae, n_prior=500, n_importance=4000, proposal="prior")
    assert abs(got.mi - exact) < 4 * got.standard_error + 0.01


def test_mutual_information_is_drawn_by_its_seed() -> None:
    vae, _ = linear_gaussian(0.3, 0.5)
    before = torch.get_rng_state()
    mi = [decoder_mutual_information(vae, n_prior=20, n_importance=50, seed=seed).mi for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert mi[0] == mi[1] != mi[2]


def test_mutual_information_is_drawn_in_batches() -> None:
    """No more rows than `batch_size` are decoded at once, and the estimate is as good."""
    vae, exact = linear_gaussian(0.3)
    rows = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    got = decoder_mutual_information(vae, n_prior=500, n_importance=8, batch_size=60)
    assert max(rows) <= 60
    assert got.ess.shape == (500,)
    assert abs(got.mi - exact) < 4 * got.standard_error


def test_mutual_information_of_pixels() -> None:
    """A decoder that ignores z says nothing of it, one that shows its sign says a bit."""
    likelihoods: dict[str, dict[str, Any]] = {"bernoulli": {}, "binomial": {"total_count": 16}}
    for likelihood, options in likelihoods.items():
        for weight, bits in ((0.0, 0), (1000.0, 1)):
            decoder = nn.Linear(1, 4)
            decoder.weight.data.fill_(weight)
            decoder.bias.data.zero_()
            vae = VAE(lambda x: None, decoder, likelihood=likelihood, prior=fastvae.StandardNormal(1), **options)
            got = decoder_mutual_information(vae, n_prior=300, n_importance=500, proposal="prior")
            assert got.mi.item() == pytest.approx(bits * math.log(2), abs=0.05)


def test_too_few_importance_samples_are_warned_of() -> None:
    vae, _ = linear_gaussian(0.01)
    with pytest.warns(UserWarning, match=r"^log_px: .*effective sample size of 1\.\d of 20"):
        decoder_mutual_information(vae, n_prior=50, n_importance=20, proposal="prior")


def test_errors_of_the_decoders_information() -> None:
    vae, _ = linear_gaussian(1.0)
    for error, named, options in (
        (ValueError, "n_prior", {"n_prior": 1}),
        (TypeError, "n_prior", {"n_prior": 2.5}),
        (ValueError, "n_importance", {"n_importance": 0}),
        (ValueError, "proposal", {"proposal": "q"}),
        (TypeError, "seed", {"seed": 0.5}),
        (ValueError, "seed", {"seed": 2**64}),
    ):
        with pytest.raises(error, match=rf"^{named}: expected"):
            decoder_mutual_information(vae, **options)

    class Mute(nn.Module):
        log_prob, mean, check = Binomial.log_prob, Binomial.mean, Binomial.check

    with pytest.raises(TypeError, match=r"^vae: expected .*sample, got likelihood Mute"):
        decoder_mutual_information(VAE(nn.Identity(), nn.Identity(), likelihood=wrong(Mute())))
    with pytest.raises(TypeError, match=r"^vae: expected"):
        decoder_mutual_information(nn.Identity())  # type: ignore[arg-type]
