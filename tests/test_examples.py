"""The examples run, and print what they promise."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed_by(example: str, *options: object) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example, *map(str, options)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_loop():
    printed = printed_by("train_loop.py")
    losses = [float(nell) + float(kl) for nell, kl in re.findall(r"Nell +(\S+) +KL +(\S+)", printed)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 10
    assert "the two KL lines differ by" in printed


def test_estimator_bias_prints_the_readmes_table():
    """The README's table is printed, but for the last digit, which other compilers may round otherwise."""

    def cells(text: str) -> dict[str, list[float]]:
        rows = re.findall(r"^\| (all 10,000 posteriors|`\w+`|wrong: .*?) \| (-?\d.*) \|$", text, re.MULTILINE)
        return {name: [float(x) for x in numbers.split(" | ")] for name, numbers in rows}

    table, readme = cells(printed_by("estimator_bias.py")), cells((ROOT / "README.md").read_text())
    assert list(table) == list(readme)
    assert len(table) == 8
    for name, numbers in table.items():
        assert numbers == pytest.approx(readme[name], abs=0.011)
        assert len(numbers) == 6
    assert table["`uniform`"][1] < math.log(64) < table["`loo`"][1]


def test_gradient_snr(tmp_path):
    """DReG's ratio grows with m, IWAE's falls, and their means agree where STL's does not."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "gradient_snr.png"
    printed = printed_by("gradient_snr.py", "--most", 16, "--repeats", 2048, "--out", picture)
    rows = re.findall(r"^ *(\d+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2, 4, 8, 16]
    dreg, dreg_mean, _, stl_mean, iwae, iwae_mean = zip(*([float(x) for x in row[1:]] for row in rows), strict=True)
    assert dreg[-1] > 1.2 * dreg[0]
    assert iwae[-1] < iwae[0] / 2
    assert iwae_mean[:4] == pytest.approx(dreg_mean[:4], rel=0.15)
    assert stl_mean[-1] > 5 * dreg_mean[-1]
    assert picture.stat().st_size > 10_000


def test_beta_tcvae(tmp_path):
    """A larger weight gives less TC; and BetaTCVAE less of it than the ELBO at equal reconstruction."""
    pytest.importorskip("matplotlib")
    picture = tmp_path / "beta_tcvae.png"
    printed = printed_by("beta_tcvae.py", "--steps", 200, "--out", picture)
    rows = re.findall(r"^(Nell.*?) +(\d\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert len(rows) == 11
    tc: dict[str, list[float]] = {}
    for label, *numbers in rows:
        nell, mi, total_correlation, dim_kl, loss = map(float, numbers)
        assert nell + mi + total_correlation + dim_kl == pytest.approx(loss, abs=0.02)
        tc.setdefault("MI" if "½" in label else "TC" if "TC" in label else "KL", []).append(total_correlation)
    for falling in tc.values():
        assert falling == sorted(falling, reverse=True)
    elbo, ours = (float(x) for x in re.findall(r"(\d\.\d{3}) with", printed))
    assert elbo == tc["KL"][1]
    assert ours < 0.7 * elbo
    assert picture.stat().st_size > 10_000


def test_the_bound_of_em_touches_the_likelihood():
    rows = re.findall(r"^EM step +\d+ +(\S+) +(\S+) +(\S+) +(\S+)$", printed_by("em_is_elbo.py"), re.MULTILINE)
    assert len(rows) == 12
    for log_likelihood, before, after, gap in (map(float, row) for row in rows):
        assert before <= after == log_likelihood
        assert gap == pytest.approx(log_likelihood - before, abs=2e-6)
    log_likelihoods = [float(row[0]) for row in rows]
    assert log_likelihoods == sorted(log_likelihoods)


def test_priors_print_a_table_and_draw(tmp_path):
    """The README's, but for the numbers: its training takes minutes."""
    pytest.importorskip("matplotlib")
    table = printed_by("priors.py", "--steps", 2, "--samples", 16, "--out", tmp_path / "hole.png").splitlines()
    readme = (ROOT / "README.md").read_text()
    assert table[0] in readme
    assert [row.split(" | ")[0] for row in table[2:]] == ["| N(0, I)", "| mixture of 100", "| VampPrior of 100"]
    for row in table[2:]:
        name, elbo, iw, _, *shares = row.strip("| ").split(" | ")
        assert f"| {name} | -" in readme
        assert float(elbo) <= float(iw) < -400  # hardly trained
        assert all(0 <= float(share.rstrip("%")) < 20 for share in shares)
    assert (tmp_path / "hole.png").stat().st_size > 100_000
