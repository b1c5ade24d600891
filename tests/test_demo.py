"""The demo: a short run from the command line, its pictures, and the parts it is made of."""

import math
import re
import sys

import pytest
import torch

from fastvae import VAE
from fastvae.__main__ import main

image = pytest.importorskip("matplotlib.image")
demo = pytest.importorskip("fastvae.demo")
plots = pytest.importorskip("fastvae.evaluation.plots")

NUMBER = r"-?\d+\.\d+"


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return VAE(demo.Encoder(), demo.make_decoder(), likelihood="binomial", total_count=demo.COUNT)


def test_a_short_run_prints_its_terms_and_draws_its_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PASSES", 1)
    threads = torch.get_num_threads()
    assert main(["demo", "--epochs", "2", "--out", str(tmp_path / "pictures"), "--seed", "1"]) == 0
    assert torch.get_num_threads() == threads
    output = capsys.readouterr().out
    rows = re.findall(rf"^ +(\d+) +({NUMBER}) +({NUMBER}) +({NUMBER}) +({NUMBER}) +({NUMBER})$", output, re.M)
    assert [int(row[0]) for row in rows] == [1, 2]
    for nell, kl, elbo, entropy, mi in ([float(v) for v in row[1:]] for row in rows):
        assert elbo == pytest.approx(-nell - kl, abs=0.02)
        assert -0.1 < mi < math.log(297) + 0.1
        assert math.isfinite(entropy)
    assert float(rows[1][3]) > float(rows[0][3]), "it did not learn"
    assert re.search(rf"held-out ELBO {NUMBER} nats per image, {NUMBER} bits per pixel", output)
    names = {"reconstructions.png", "samples.png", "terms.png", "aggregate.png", "demo.png"}
    assert {path.name for path in (tmp_path / "pictures").iterdir()} == names
    for name in names:
        assert name in output
        pixels = image.imread(tmp_path / "pictures" / name)  # [H, W, 4]
        assert min(pixels.shape[:2]) > 400
        assert 0.01 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.9, "blank, or all ink"


def test_seconds_end_the_training(monkeypatch, vae):
    x, held_out, _, _ = demo.load()
    held_out_terms, train_terms = demo.train(vae, x[:200], held_out[:50], epochs=10**6, seconds=0.5)
    assert 1 <= len(held_out_terms) == len(train_terms) < 1000


def test_the_split_is_the_same_for_every_seed_and_loses_nothing():
    torch.manual_seed(1)
    x, held_out, labels, held_out_labels = demo.load()
    torch.manual_seed(2)
    assert torch.equal(held_out, demo.load()[1])
    assert (len(x), len(held_out), len(labels), len(held_out_labels)) == (1500, 297, 1500, 297)
    assert held_out_labels.unique().tolist() == list(range(10))


def test_distorted_images_are_counts_with_the_same_ink():
    torch.manual_seed(0)
    x = demo.load()[0]
    moved = demo.distort(x)
    assert torch.equal(moved, moved.round())
    assert (moved.min(), moved.max()) == (0, demo.COUNT)
    kept = (moved == x).flatten(1).all(1).float().mean()
    assert abs(kept - (1 - demo.AUGMENTED)) < 0.06  # 5 standard errors
    assert float(moved.mean()) == pytest.approx(float(x.mean()), rel=0.03)


def test_terms_are_consistent(vae):
    x = demo.load()[1][:50]
    terms = demo.evaluate(vae, x)
    assert terms.elbo == pytest.approx(-terms.nell - terms.kl)
    assert -0.05 < terms.mi <= math.log(50)


def test_tile():
    tiled = plots.tile(torch.arange(24.0).view(6, 2, 2), columns=3)
    nan = math.nan
    expected = [
        [0, 1, nan, 4, 5, nan, 8, 9],
        [2, 3, nan, 6, 7, nan, 10, 11],
        [nan] * 8,
        [12, 13, nan, 16, 17, nan, 20, 21],
        [14, 15, nan, 18, 19, nan, 22, 23],
    ]
    torch.testing.assert_close(tiled, torch.tensor(expected), equal_nan=True)


@pytest.mark.parametrize("missing", ["sklearn", "matplotlib", "tqdm"])
def test_a_missing_extra_is_named(missing, monkeypatch, capsys):
    unloaded = (f"{missing}.", "fastvae.demo", "fastvae.evaluation.plots")
    for name in [name for name in sys.modules if name.startswith(unloaded)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delattr("fastvae.demo")
    monkeypatch.delattr("fastvae.evaluation.plots")
    assert main(["demo"]) == 1
    error = capsys.readouterr().err
    assert missing in error
    assert "pip install 'fastvae[demo]'" in error
