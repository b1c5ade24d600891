"""Two revisions compared, and how cost grows: what is slower is found, and what is noise is not."""

import json
import math
import random
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from bench.cpu import calls, compare, report, scaling
from bench.cpu.compare import Revision, Worker, difference
from fastvae.backends import native_library


def rounds(seed: int, factor: float = 1.0, jitter: float = 0.02, n: int = compare.ROUNDS) -> list[float]:
    """Times of a call on a machine that gets slower and slower, each off by a few percent, some by far."""
    off = random.Random(seed)
    outliers = [5.0 if off.random() < 0.1 else 1.0 for _ in range(n)]
    return [factor * (1 + k / n) * outlier * math.exp(off.gauss(0, jitter)) for k, outlier in enumerate(outliers)]


@pytest.mark.parametrize(("factor", "verdict"), [(1.1, "slower"), (0.9, "faster"), (1.0, "within noise")])
def test_a_tenth_is_seen_and_nothing_is_not(factor: float, verdict: str) -> None:
    found = [difference(rounds(seed), rounds(seed + 100), rounds(seed + 200, factor)) for seed in range(50)]
    assert sum(d.verdict == verdict for d in found) >= 49
    assert all(abs(math.log(d.ratio / factor)) < 0.05 for d in found)


def test_more_noise_hides_more() -> None:
    calm, wild = (difference(*(rounds(seed, jitter=jitter) for seed in (1, 2, 3))) for jitter in (0.01, 0.3))
    assert calm.noise < 0.03 < 0.1 < wild.noise


def test_a_base_unlike_itself_is_noise() -> None:
    assert difference(rounds(1), rounds(2, 1.2), rounds(3, 1.2)).verdict == "within noise"


@pytest.fixture(scope="module")
def this_revision() -> Revision:
    if not native_library.status()[0]:
        pytest.skip("no native library")
    return Revision(compare.ROOT, Path(native_library.library()._name).resolve())


def test_a_worker_runs_the_revision_it_is_given(this_revision: Revision, tmp_path: Path) -> None:
    package = tmp_path / "fastvae"
    package.mkdir()
    (package / "__init__.py").write_text("def kl_gauss(mu, logvar): raise RuntimeError('another fastvae')")
    call = str(calls.SMALL[0])
    real, other = Worker(this_revision), Worker(Revision(tmp_path, this_revision.library), OMP_NUM_THREADS="1")
    times = real.run(call, 3)
    assert len(times) == 3
    assert all(0 < t < 10 for t in times)
    with pytest.raises(RuntimeError, match="ended with status 1"):
        other.run(call, 1)
    real.close()
    assert real.process.returncode == 0


@pytest.mark.parametrize("call", calls.SMALL, ids=str)
def test_a_call_gives_what_is_to_be_timed(call: calls.Call) -> None:
    result = calls.prepared(call)()
    of_all, of_each = (call.B,), (call.B, call.D)
    forward = [of_all, of_each] if call.function == "agg_log_prob_marginals" else [of_all]
    gradients = [of_each] * (3 if call.function.startswith("agg") else 2)
    assert [x.shape for x in result] == (gradients if call.backward else forward)  # type: ignore[attr-defined]


def test_an_unknown_base_is_named_and_nothing_is_left() -> None:
    with (
        pytest.raises(SystemExit, match="BASE: expected a commit, got 'no-such-commit'"),
        compare.checked_out("no-such-commit"),
    ):
        pass


def test_a_base_is_checked_out_and_removed() -> None:
    if subprocess.run(["git", "-C", compare.ROOT, "rev-parse", "HEAD"], capture_output=True).returncode:
        pytest.skip("not a repository")
    with compare.checked_out("HEAD") as (tree, _):
        assert (tree / "fastvae" / "__init__.py").exists()
    assert not tree.exists()


# How cost grows.

LADDER = {"scaling": "agg_log_prob", "mode": "forward", "D": 32, "sizes": [32, 64, 128, 256]}


def test_the_exponent_and_where_the_cost_changes() -> None:
    elements = [10.0**n for n in range(9)]
    assert scaling.exponent(elements, [3e-9 * e**1.5 for e in elements]) == pytest.approx(1.5)
    overhead = [1e-4 + 1e-9 * e for e in elements]  # a call's own 100 µs
    assert scaling.exponent(elements, overhead) == pytest.approx(1.0, abs=0.05)
    assert scaling.flat_from(elements, overhead) == 6
    assert scaling.flat_from(elements, [e * (3 if e < 1e4 else 2) for e in elements]) == 4


def test_a_ladder_is_measured_on_one_thread_and_on_all() -> None:
    import torch

    threads = torch.get_num_threads()
    found = scaling.measure(scaling.Ladder("agg_log_prob", "forward", 10, 8, 2))
    assert torch.get_num_threads() == threads
    assert found["sizes"] == [8, 16]
    assert found["elements"] == [640.0, 2560.0]
    assert {int(n) for n in found["seconds"]} == {1, threads}
    assert all(t > 0 for times in found["seconds"].values() for t in times)


def test_the_report_says_how_cost_grows(tmp_path: Path) -> None:
    times = {"1": [1e-3, 2e-3, 8e-3, 32e-3], "2": [1e-3, 2e-3, 4e-3, 16e-3]}
    measured = LADDER | {"elements": [32.0 * 4**n * 1024 for n in range(4)], "seconds": times}
    path = tmp_path / "1.json"
    head = {"machine_info": {"cpu": "c", "threads": 2}, "commit_info": {"id": "0"}, "datetime": "2026-01-02"}
    path.write_text(json.dumps(head | {"benchmarks": [{"extra_info": measured}]}))
    results = report.load([path])
    assert not results.cases
    path.write_text(report.dump(results))
    assert report.load([path]) == results
    lines = "\n".join(report.scaling_lines(results))
    assert "| agg_log_prob, forward, D 32 | 1 | 0.85 | 1.53e+04 ps | 64 | 1.53e+04 ps at 64 | 1.00× |" in lines
    assert "|  | 2 | 0.65 | 7.63e+03 ps | 128 | 7.63e+03 ps at 128 | 2.00× |" in lines
