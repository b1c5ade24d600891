"""The choice of a backend and of the other settings, and the reference's own promise about memory."""

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TARGETS, Target
from support.helpers import assert_accurate, wrong
from support.ops import op_named
from torch import Tensor

import fastvae
from fastvae import backends
from fastvae.backends import native_library, reference, settings
from fastvae.backends.contract import OPS, Backend

CPU = torch.device("cpu")


def used() -> Backend:
    return backends.backend_for(CPU)


@pytest.fixture(autouse=True)
def _choice_restored() -> object:
    with fastvae.use_backend(None):
        yield


def test_the_fixture_chooses(backend: Target) -> None:
    assert backends.name_for(CPU) == backend.backend
    if backend.instruction_set:
        assert native_library._instruction_set == backend.instruction_set


def test_best_available_by_default() -> None:
    best = next(name for name in backends.CANDIDATES["cpu"] if backends.status(name).available)
    assert backends.name_for(CPU) == best


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


@pytest.mark.parametrize("name", ["fast", "", "Reference", 1, ["native"], np.array(["native", "cuda"])])
def test_unknown_name(name: Any) -> None:
    before = used()
    with pytest.raises(ValueError, match="backend: expected one of"):
        fastvae.use_backend(name)
    assert used() is before


@pytest.mark.parametrize("exact_skip", ["yes", 1, 0.0, np.array([True]), torch.tensor(True)])
def test_an_exact_skip_that_is_neither_yes_nor_no(exact_skip: Any) -> None:
    before = used(), settings.exact_skip()
    with pytest.raises(TypeError, match="exact_skip: expected True, False or None, got"):
        fastvae.use_backend("reference", exact_skip=exact_skip)
    assert (used(), settings.exact_skip()) == before


def test_an_exact_skip_of_numpy() -> None:
    with fastvae.use(exact_skip=wrong(np.bool_(False))):
        assert settings.exact_skip() is False
        fastvae.agg_log_prob(*torch.zeros(3, 4, 2))  # which hands it to C


def test_each_setting_alone_leaves_the_others() -> None:
    with fastvae.use(backend="reference", exact_skip=False, precision="tf32x3"):
        assert settings.current == settings.Settings("reference", False, "tf32x3")
        others: dict[str, Any] = {"backend": None, "exact_skip": True, "precision": "exact"}
        for name, value in others.items():
            before = settings.current
            with fastvae.use(**{name: value}):
                assert settings.current == before._replace(**{name: value})
            assert settings.current == before
        with fastvae.use():
            assert settings.current == ("reference", False, "tf32x3")


def test_exact_skip_alone_keeps_the_backend() -> None:
    with fastvae.use_backend("reference"), fastvae.use(exact_skip=False):
        assert used() is reference
        assert settings.exact_skip() is False


def test_settings_nest_and_are_restored() -> None:
    """Settings are restored also where a plain statement within a block has set something else."""
    before = settings.current
    with fastvae.use(backend="reference", exact_skip=True):
        with fastvae.use(backend=None, precision="tf32x3"):
            assert settings.current == (None, True, "tf32x3")
            fastvae.use(backend="reference", exact_skip=None)
            assert settings.current == ("reference", None, "tf32x3")
        assert settings.current == ("reference", None, before.precision)
    assert settings.current == before
    with pytest.raises(KeyError), fastvae.use(backend="reference", exact_skip=False, precision="tf32x3"):
        raise KeyError
    assert settings.current == before


def test_settings_from_here_on() -> None:
    with fastvae.use(backend=None, exact_skip=None, precision="exact"):  # to be restored
        fastvae.use(backend="reference", exact_skip=False)
        fastvae.use(precision="tf32x3")
        assert used() is reference
        assert settings.current == ("reference", False, "tf32x3")


@pytest.mark.parametrize("name", ["backend", "exact_skip", "precision"])
def test_one_bad_setting_changes_none(name: str) -> None:
    good: dict[str, Any] = {"backend": "reference", "exact_skip": False, "precision": "tf32x3"}
    before = settings.current
    error = TypeError if name == "exact_skip" else ValueError
    with pytest.raises(error, match=f"^{name}: expected "):
        fastvae.use(**good | {name: "yes"})
    assert settings.current == before


def test_a_backend_that_is_not_available_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_status", lambda name: backends.BackendStatus(name, False, "it is away"))
    before = settings.current
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: it is away"):
        fastvae.use(precision="tf32x3", exact_skip=False, backend="cuda")
    assert settings.current == before


def test_settings_within_compiled_code() -> None:
    """Settings in compiled code break no graph, and what is within a block computes by them."""

    def kl(x: Tensor) -> Tensor:
        with fastvae.use(backend=None), fastvae.precision("tf32x3"):
            return fastvae.kl_gauss(x, x) + (1 if settings.current.precision == "tf32x3" else 0)

    x = torch.ones(3, 2)
    with fastvae.use(backend="reference", precision="exact"):
        assert torch.equal(torch.compile(kl, backend="eager", fullgraph=True)(x), 1 + fastvae.kl_gauss(x, x))
        assert settings.current[::2] == ("reference", "exact")


def test_short_forms_are_the_same() -> None:
    with fastvae.use_backend("reference", exact_skip=False), fastvae.precision("tf32x3"):
        assert settings.current == ("reference", False, "tf32x3")
        with fastvae.use_backend(None):  # keeps the others
            assert settings.current == (None, False, "tf32x3")


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
    name = "print(backends.name_for(torch.device('cpu')))"
    assert run(name, FASTVAE_BACKEND="reference").stdout.strip().endswith("reference")
    best = next(b for b in backends.CANDIDATES["cpu"] if backends.status(b).available)
    assert run(name, FASTVAE_BACKEND="").stdout.strip().endswith(best)


KL = "fastvae.kl_gauss(torch.zeros(1, 1), torch.zeros(1, 1))"


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("FASTVAE_BACKEND", "fast", "expected one of native, triton, cuda, reference"),
        ("FASTVAE_BACKEND", "cuda", "it is not available: "),  # FASTVAE_CUDA_LIBRARY being none
        ("FASTVAE_EXACT_SKIP", "yes", "expected 0 or 1"),
        ("FASTVAE_LIBRARY", "/dev/null", ""),
        ("FASTVAE_CPU_ISA", "mmx", ""),
    ],
)
def test_a_variable_that_cannot_be_followed_is_an_error_that_names_it(variable: str, value: str, reason: str) -> None:
    """The first call fails, and no other backend computes it in silence."""
    unset = dict.fromkeys(("FASTVAE_BACKEND", "FASTVAE_LIBRARY", "FASTVAE_CUDA_LIBRARY", "FASTVAE_CPU_ISA"), "")
    ran = run(KL, **unset | {variable: value})
    assert ran.returncode == 1
    error = ran.stderr.splitlines()[-1]
    assert f"WrongSetting: {variable}={value}: {reason}" in error
    assert issubclass(settings.WrongSetting, RuntimeError)


def test_a_wrong_choice_is_overridden_by_a_right_one() -> None:
    assert run(f"fastvae.use_backend('reference'); print({KL}.item())", FASTVAE_BACKEND="fast").stdout == "0.0\n"


def test_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("0", False), ("1", True), ("", None)):
        monkeypatch.setenv("FASTVAE_EXACT_SKIP", value)
        assert settings.switch("FASTVAE_EXACT_SKIP") is expected
    monkeypatch.delenv("FASTVAE_EXACT_SKIP")
    assert settings.switch("FASTVAE_EXACT_SKIP") is None


def test_a_wrong_switch_of_the_kernels_is_named_too() -> None:
    pytest.importorskip("triton")
    ran = run("print(backends.status('triton').detail)", FASTVAE_AUTOTUNE="often")
    assert ran.stdout == "FASTVAE_AUTOTUNE=often: expected 0 or 1\n"


@pytest.mark.parametrize("name", ["cross_log_prob", "agg_log_prob", "agg_log_prob_marginals"])
@pytest.mark.parametrize("budget", [1, 20_000])
def test_reference_computes_in_chunks(name: str, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are a row each, or a few rows with a remainder."""
    with fastvae.use_backend("reference"):
        op = op_named(name, S=19, N=23, D=11)
        monkeypatch.setattr(reference, "CHUNK_BYTES", budget)
        assert_accurate(op.fast, op.formula, op.inputs, op.centred)


def test_reference_stays_within_its_budget() -> None:
    """The reference stays within its budget whatever S and N; in a process of its own, where a single [S, N, D] tensor
    would be 288 MB."""
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


def test_triton_says_why_it_is_not_available() -> None:
    """Triton is missing, or has no GPU; and nothing of it is imported before it is asked for."""
    status = "print(*backends.status('triton')[1:])"
    nothing = "import sys; sys.modules['triton'] = None; " + status
    assert run(nothing, TRITON_INTERPRET="").stdout.startswith("False Triton cannot be imported")
    if backends.status("triton").available and not torch.cuda.is_available():
        assert "no GPU" in run(status, TRITON_INTERPRET="").stdout
    computing = "fastvae.kl_gauss(torch.zeros(2, 2), torch.zeros(2, 2)); import sys; print('triton' in sys.modules)"
    assert run(computing, FASTVAE_BACKEND="", TRITON_INTERPRET="").stdout.strip() == "False"


def test_triton_computes_on_the_cpu_only_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    code = "backends.triton.kl_gauss(torch.zeros(2, 2), torch.zeros(2, 2), None, None, 'sum')"
    failed = run(f"import fastvae.backends.triton; {code}", TRITON_INTERPRET="")
    assert "RuntimeError: backend 'triton' computes on cpu tensors only in Triton's interpreter" in failed.stderr
    assert run(f"import fastvae.backends.triton; print({code})", TRITON_INTERPRET="1").stdout == "tensor(0.)\n"


@pytest.mark.parametrize("name", backends.NAMES)
def test_a_backend_has_the_functions_of_the_contract(name: str) -> None:
    """They have the contract's parameters, under its names; Triton's launchers may have more, from what is set."""
    if name == "triton":
        pytest.importorskip("triton")
    backend = importlib.import_module(f"fastvae.backends.{name}")
    functions = [f"{op}{direction}" for op in OPS for direction in ("", "_backward")]
    assert ["status", *functions] == [function for function in vars(Backend) if not function.startswith("_")]
    for function in functions:
        _, *promised = inspect.signature(getattr(Backend, function)).parameters
        found = list(inspect.signature(getattr(backend, function)).parameters)
        assert found[: len(promised)] == promised, function
        assert name == "triton" or found == promised, function
    with pytest.raises(AttributeError, match="no attribute 'kl'"):
        _ = backend.kl


def test_kernels_import_nothing_above_them() -> None:
    """Kernels import nothing above them: they are told what they need."""
    modules = list((Path(__file__).parents[2] / "kernels" / "triton").glob("*.py"))
    assert modules
    for module in modules:
        assert not re.search(r"^\s*(from|import) (fastvae|\.\.)", module.read_text(), re.M), module


@pytest.fixture
def tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Callable[..., int], list[int]]:
    """`fastest` of three configurations, of which it then finds the second, and what was timed."""
    triton = pytest.importorskip("triton")
    from fastvae.kernels.triton import _launch

    timed: list[int] = []

    def seconds(run: Callable[[], int], **_: object) -> float:
        timed.append(run())
        return [3.0, 1.0, 2.0][timed[-1]]

    monkeypatch.setattr(_launch, "_tuned", {})
    monkeypatch.setattr(triton.testing, "do_bench", seconds)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    configs = [{"n": 0}, {"n": 1}, {"n": 2}]

    def fastest(*problem: object) -> int:
        return _launch.fastest(lambda config: config["n"], configs, *problem)

    assert fastest("op", 1000) == 0
    monkeypatch.setattr(_launch, "AUTOTUNE", True)
    return fastest, timed


def test_autotuning_measures_once(tuning: tuple[Callable[..., int], list[int]]) -> None:
    from fastvae.kernels.triton import _launch

    fastest, timed = tuning
    assert [fastest("op", 1000), fastest("op", 1024), fastest("op", 600)] == [1, 1, 1]  # one size to a power of 2
    assert timed == [0, 1, 2]
    _launch._tuned.clear()  # as in another process
    assert fastest("op", 1000) == 1
    assert timed == [0, 1, 2]
    assert fastest("op", 1025) == 1
    assert timed == [0, 1, 2] * 2


def test_a_captured_graph_takes_what_was_tuned(
    tuning: tuple[Callable[..., int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture takes what was tuned, which has been compiled; nothing is measured within, where nothing may wait."""
    fastest, timed = tuning
    fastest("op", 1000)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert fastest("op", 1000) == 1
    assert fastest("op", 9000) == 0
    assert timed == [0, 1, 2]


def test_what_was_tuned_is_kept_whole(
    tuning: tuple[Callable[..., int], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that adds to the file keeps what others have added, and one that is stopped while it writes leaves
    what was there."""
    fastest, _ = tuning
    file = tmp_path / "fastvae-tuned.json"
    file.write_text('{"another": 2}')
    fastest("op", 1000)
    kept = json.loads(file.read_text())
    assert len(kept) == 2
    assert kept["another"] == 2

    write = Path.write_text

    def stopped(self: Path, text: str) -> int:
        write(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        fastest("op", 5000)
    monkeypatch.undo()
    assert json.loads(file.read_text()) == kept
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("found", ['{"half', "[1, 2]", '{"a": "b"}', "\x00"], ids=["half", "list", "words", "bytes"])
def test_a_file_of_tunings_that_is_broken_is_measured_again(
    tuning: tuple[Callable[..., int], list[int]], tmp_path: Path, found: str
) -> None:
    fastest, timed = tuning
    file = tmp_path / "fastvae-tuned.json"
    file.write_text(found)
    assert fastest("op", 1000) == 1
    assert timed == [0, 1, 2]
    assert list(json.loads(file.read_text()).values()) == [1]


def test_a_folder_that_cannot_be_written_is_no_error(
    tuning: tuple[Callable[..., int], list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastest, _ = tuning
    file = tmp_path / "a file"
    file.write_text("")
    monkeypatch.setattr(pytest.importorskip("triton").knobs.cache, "dir", str(file))  # as a folder: even for root
    assert [fastest("op", 1000), fastest("op", 1000)] == [1, 1]
