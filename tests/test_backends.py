"""Who computes: the choice of a backend, and the reference's own promise about memory."""

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from conftest import TARGETS, Target
from helpers import assert_accurate, op_named

import fastvae
from fastvae import backends
from fastvae.backends import reference

CPU = torch.device("cpu")


def used() -> ModuleType:
    return backends.backend_for(CPU)


@pytest.fixture(autouse=True)
def _choice_restored() -> object:
    with fastvae.use_backend(None):
        yield


def test_the_fixture_chooses(backend: Target) -> None:
    assert used().__name__ == f"fastvae.backends.{backend.backend}"
    if backend.instruction_set:
        assert used()._instruction_set == backend.instruction_set


def test_best_available_by_default() -> None:
    best = next(name for name in backends.CANDIDATES["cpu"] if backends.status(name).available)
    assert used().__name__.endswith(best)


def test_as_a_context_manager_and_as_a_function() -> None:
    default = used()
    with fastvae.use_backend("reference"):
        assert used() is reference
        with fastvae.use_backend(None):
            assert used() is default
        assert used() is reference
    assert used() is default
    fastvae.use_backend("reference")
    assert used() is reference
    fastvae.use_backend(None)
    assert used() is default


def test_restored_after_an_exception() -> None:
    default = used()
    with pytest.raises(KeyError), fastvae.use_backend("reference"):
        raise KeyError
    assert used() is default


@pytest.mark.parametrize("name", ["fast", "", "Reference", 1])
def test_unknown_name(name: object) -> None:
    before = used()
    with pytest.raises(ValueError, match="backend: expected one of"):
        fastvae.use_backend(name)
    assert used() is before


def test_every_backend_has_a_status() -> None:
    for name in backends.NAMES:
        status = backends.status(name)
        assert status.name == name
        assert status.detail
    assert backends.status("reference").available


def test_every_backend_is_tested() -> None:
    assert {target.backend for target in TARGETS.values()} == set(backends.NAMES)


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"import fastvae, torch; from fastvae import backends; {code}"],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_environment_variable() -> None:
    name = "print(backends.backend_for(torch.device('cpu')).__name__)"
    assert run(name, FASTVAE_BACKEND="reference").stdout.strip().endswith("reference")
    best = next(b for b in backends.CANDIDATES["cpu"] if backends.status(b).available)
    assert run(name, FASTVAE_BACKEND="").stdout.strip().endswith(best)
    unknown = run("fastvae.kl_gauss(torch.zeros(1, 1), torch.zeros(1, 1))", FASTVAE_BACKEND="fast")
    assert unknown.returncode == 1
    assert "expected one of" in unknown.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", ["cross_log_prob", "agg_log_prob", "agg_log_prob_marginals"])
@pytest.mark.parametrize("budget", [1, 20_000])
def test_reference_computes_in_chunks(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row at a time, or a few with a remainder."""
    with fastvae.use_backend("reference"):
        op = op_named(name, S=19, N=23, D=11)
        monkeypatch.setattr(reference, "CHUNK_BYTES", budget)
        assert_accurate(op.fast, op.formula, op.inputs, op.centred)


def test_reference_stays_within_its_budget() -> None:
    """Whatever S and N, in a process of its own: here a single [S, N, D] tensor would be 288 MB."""
    code = """
import resource
fastvae.use_backend("reference")
z, mu = torch.randn(3000, 8), torch.randn(3000, 8, requires_grad=True)
fastvae.agg_log_prob(z[:9], mu[:9], mu[:9]).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
joint, marginals = fastvae.agg_log_prob_marginals(z, mu, mu)
(joint.sum() + marginals.sum()).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    assert float(run(f"exec({code!r})").stdout) < 2 * reference.CHUNK_BYTES / 2**20
