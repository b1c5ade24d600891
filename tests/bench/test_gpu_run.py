"""Rehearsals, on a mocked GPU (mocked_gpu/), of what is run on a real one, in processes of their own."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from bench.cases import OPS
from bench.gpu.contests import SMALL_TABLE, TABLE
from bench.gpu.harness import BACKENDS

ROOT = Path(__file__).parents[2]
MOCK = ROOT / "tests" / "support" / "mocked_gpu"
PARTS = ("sanity", "measure", "profile", "tests", "peers")


def mocked(**more: str) -> dict[str, str]:
    """The environment of a machine with a GPU."""
    usual = {name: value for name, value in os.environ.items() if not name.startswith(("FASTVAE", "TRITON"))}
    return usual | {"PYTHONPATH": f"{MOCK}:{ROOT}", "OMP_NUM_THREADS": "1"} | more


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of a machine with a GPU and a library of CUDA kernels."""
    library = tmp_path / "libfastvae_cuda.so"
    library.touch()
    return mocked(FASTVAE_CUDA_LIBRARY=str(library))


def run(program: str, environment: dict[str, str], **more: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment | more,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_the_mocked_gpu(environment: dict[str, str]) -> None:
    """The mocked GPU refuses what a real one would, replays what was captured, moves gradients with their tensors."""
    program = """
        import pytest, torch
        x = torch.randn(5, 3, device="cuda")
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(5, 3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert all(y.is_cuda for y in (x[0], 2 * x, torch.zeros_like(x), x.to("cuda"), x.double(), x.sum()))
        assert not any(y.is_cuda for y in (x.cpu(), x.to("cpu"), torch.zeros(3)))
        with torch.device("cuda"):
            assert all(y.is_cuda for y in (torch.zeros(3), torch.tensor([1.0]), torch.randn(3), torch.arange(3)))
        generators = [torch.Generator("cuda").manual_seed(0) for _ in range(2)]
        assert torch.equal(*(torch.randn(3, generator=g, device="cuda") for g in generators))

        leaf = torch.ones(3, requires_grad=True)
        (3 * leaf.to("cuda")).sum().backward()
        assert leaf.grad.tolist() == [3, 3, 3] and not leaf.grad.is_cuda

        layer = torch.nn.Linear(3, 2).to("cuda")
        optimizer = torch.optim.AdamW(layer.parameters())
        before = layer.weight.detach().clone()
        layer(x).square().sum().backward()
        optimizer.step()
        assert layer.weight.is_cuda and (layer.weight != before).all()

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = torch.zeros(5, device="cuda")
            y += x.sum(1)
            with pytest.raises(RuntimeError, match="capturing"):
                y[0].item()
        x.fill_(2)
        graph.replay()
        assert y.tolist() == [6] * 5
    """
    run(program, environment)


def test_every_op_on_the_mocked_gpu(environment: dict[str, str]) -> None:
    program = """
        import pytest, torch
        import fastvae
        from bench.cases import OPS
        from bench.gpu.measure import everything
        from fastvae import backends

        def results(device):
            found = []
            for op in OPS.values():
                found += everything(op.checked or op.function, *(x.to(device) for x in op.inputs(5, 3, 0)))()
            assert all(x.device.type == device for x in found)
            return [x.cpu() for x in found]

        with fastvae.use_backend("reference"):
            expected = results("cpu")
        for name in ("triton", "cuda"):
            assert backends.status(name).available
            with fastvae.use_backend(name):
                with pytest.raises(RuntimeError, match="cpu tensors"):
                    results("cpu")
                for a, b in zip(results("cuda"), expected, strict=True):
                    torch.testing.assert_close(a, b)
    """
    run(program, environment)


def test_inputs_need_no_backend(environment: dict[str, str]) -> None:
    """The backend that is measured does not compute on the CPU, where they are made."""
    program = """
        from bench.cases import OPS, VARIANTS

        for op in (OPS | VARIANTS).values():
            assert not any(x.is_cuda for x in op.inputs(16, 8, 0))
            assert all(x.is_cuda for x in op.inputs(16, 8, 0, "cuda"))
    """
    run(program, environment, FASTVAE_BACKEND="cuda")


def test_a_sleep_that_is_too_short(environment: dict[str, str]) -> None:
    """The call is repeated behind a longer one, up to the longest."""
    program = """
        import torch
        from bench.gpu.harness import CLOCK, LONGEST, once

        slept = []
        torch.cuda._sleep = slept.append
        torch.cuda.Event.late = 2
        once(lambda: None)
        assert len(slept) == 3 and slept == sorted(slept) and slept[-1] >= 4 * slept[0]
        slept.clear()
        torch.cuda.Event.late = 1000
        once(lambda: None)
        assert slept[-1] == int(LONGEST * CLOCK) and len(slept) < 12
    """
    run(program, environment)


def test_a_first_call_in_a_graph_that_is_refused(environment: dict[str, str]) -> None:
    """A refusal is told apart from other errors by what it says."""
    program = """
        from bench.gpu.sanity import first_in_graph

        assert first_in_graph("triton") == (True, "refused: RuntimeError: agg_log_prob has not run yet")
        assert first_in_graph("cuda") == (False, "refused: RuntimeError: agg_log_prob has not run yet")
    """
    faults = "capture:triton.agg_log_prob,capture:cuda.agg_log_prob"
    run(program, environment, MOCKED_GPU_FAULTS=faults, FASTVAE_TRIAL="1")


def test_nothing_asks_cuda_before_processes_are_forked() -> None:
    """A process whose parent has a context can have none."""
    program = """
        import torch

        asked = []

        for name in ("is_available", "device_count", "_lazy_init", "current_device", "get_device_properties"):
            setattr(torch.cuda, name, lambda *_, name=name: asked.append(name))
        from bench.gpu import measure, sanity
        from bench.gpu.jobs import import_all

        import_all()
        assert [*measure.checks(), *measure.table(None), *measure.small_table(), *measure.peers_table()]
        assert sanity.trials(("triton", "cuda"))
        assert not asked, asked
    """
    run(program, mocked(PYTHONPATH=str(ROOT)))


# The script, at tiny sizes and with mocked tools.


def started(part: str, folder: Path, **more: str) -> subprocess.Popen[str]:
    tools = {"PATH": f"{MOCK / 'bin'}:{os.environ['PATH']}", "PYTHON": sys.executable}
    tools |= {"FASTVAE_TRIAL": "1", "FASTVAE_GPU_BUILD": str(folder / "build"), "FASTVAE_COMMIT": "abc123"}
    return subprocess.Popen(
        [str(ROOT / "bench" / "gpu" / "run.sh"), part, "out"],
        env=mocked(**tools | more),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> tuple[int, str]:
    said = process.communicate(timeout=300)[0]
    return process.returncode, said


def kept(folder: Path, part: str) -> dict[str, str]:
    """The files in a part's archive."""
    with tarfile.open(folder / "out" / f"{part}.tar.gz") as archive:
        members = {m.name.removeprefix("./"): archive.extractfile(m) for m in archive.getmembers()}
        return {name: file.read().decode() for name, file in members.items() if file}


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A rehearsal of all parts, where nothing goes wrong: where they left their archives, and what was printed."""
    folder = tmp_path_factory.mktemp("gpu")
    status, said = result(started("all", folder))
    assert status == 0, said
    return folder, said


def test_all_parts(rehearsal: tuple[Path, str]) -> None:
    folder, said = rehearsal
    assert sorted(path.name for path in (folder / "out").iterdir()) == sorted(f"{part}.tar.gz" for part in PARTS)
    promised = {
        "sanity": ["build.txt", "machine.txt", "sanity.json", "sanity.md"],
        "measure": [f"{name}.{kind}" for name in ("checks", "table", "small") for kind in ("json", "md", "txt")],
        "profile": [f"ncu-{backend}.csv" for backend in BACKENDS],
        "tests": ["pytest.txt", "memcheck.txt", "racecheck.txt", "a_graph_draws_anew_at_each_replay.txt"],
        "peers": ["peers.json", "peers.md"],
    }
    for part, text in zip(PARTS, f"\n{said}".split("\n== ")[1:], strict=True):
        assert text.startswith(part)
        assert text.count("\n") <= 48
        files = kept(folder, part)
        assert {*promised[part], "steps", "summary.txt"} <= files.keys()
        assert all(line.endswith(" s, ok") for line in files["steps"].splitlines())
    assert "abc123" in kept(folder, "measure")["table.md"]
    assert all(f"\n{contest}: " in said for contest in (*TABLE, *SMALL_TABLE))  # nothing is cut off
    assert "joint_sums: 1.2 us, issue 88%" in said
    assert "stalls: math_pipe_throttle 2.50, wait 0.50" in said


def test_every_op_and_backend_has_a_number(rehearsal: tuple[Path, str]) -> None:
    folder, _ = rehearsal
    sanity = json.loads(kept(folder, "sanity")["sanity.json"])
    dtypes = ("float32", "bfloat16", "float64")
    what = (*(f"{op}, {dtype}" for op in OPS for dtype in dtypes), "a graph", "a first call in a graph")
    assert {title: how for title, (how, *_) in sanity.items()} == {
        f"{w} on {b}": "PASS" for w in what for b in BACKENDS
    }
    files = kept(folder, "measure")
    parts: dict[str, Any] = {name: json.loads(files[f"{name}.json"])["done"] for name in ("checks", "table", "small")}
    for backend in BACKENDS:
        assert parts["checks"][f"determinism on {backend}"]["numbers"] == dict.fromkeys(OPS, True)
        for check in ("memory", "dsprites"):
            assert parts["checks"][f"{check} on {backend}"]["numbers"] is not None
    seen = set()
    for name in ("table", "small"):
        for key, row in parts[name].items():
            times = row["numbers"]["seconds"]
            assert times, key
            assert all(isinstance(x, float) and x > 0 for t in times.values() for x in t), key
            seen |= {(name, key.partition(",")[0], "backward" in key, who) for who in times}
    ours = [("table", b) for b in BACKENDS] + [("small", b + graph) for b in BACKENDS for graph in ("", ", graph")]
    assert {(name, op, backward, who) for name, who in ours for op in OPS for backward in (False, True)} <= seen


def test_what_fails_is_said_and_the_rest_goes_on(tmp_path: Path) -> None:
    faults = "raise:triton.kl_gauss,noise:triton.agg_log_prob,hang:cuda.agg_log_prob_marginals_backward"
    faults += ",fault:cuda.kl_gauss_backward"
    status, said = result(started("measure", tmp_path, MOCKED_GPU_FAULTS=faults, FASTVAE_STALL="2"))
    assert status == 1
    assert said.count("\n") <= 48
    for line in (
        "kl_gauss on triton: RuntimeError: kl_gauss is mocked to fail",
        "agg_log_prob on triton: not deterministic",
        "agg_log_prob_marginals on cuda: HANG",
        "kl_gauss on cuda: FAULT (exit status 139)",
        "agg_log_prob_marginals, forward + backward, [8192, 32]: cuda: HANG",
    ):
        assert f"FAILED {line}" in said
    done = json.loads(kept(tmp_path, "measure")["table.json"])["done"]
    seconds = done["agg_log_prob_marginals, forward + backward, [8192, 32]"]["numbers"]["seconds"]
    assert seconds["triton"][0] > 0
    assert isinstance(seconds["cuda"], str)


@pytest.mark.parametrize("call", [3, 4])
def test_a_fault_after_the_first_calls(environment: dict[str, str], tmp_path: Path, call: int) -> None:
    """A fault leaves out the contestant that is timed for the first time; later, the job; the next ones are done."""
    table = [sys.executable, "-m", "bench.gpu.measure", "table", str(tmp_path), "--only", "agg_log_prob, forward"]
    more = {"FASTVAE_TRIAL": "1", "MOCKED_GPU_FAULTS": f"fault{call}:cuda.agg_log_prob"}
    assert subprocess.run(table, env=environment | more, cwd=ROOT, capture_output=True).returncode == 1
    state = json.loads((tmp_path / "table.json").read_text())
    jobs = [f"agg_log_prob, {how}, [16384, {D}]" for D in (64, 10) for how in ("forward", "forward + backward")]
    fault = "FAULT (exit status 139)"
    if call == 3:
        assert state["bad"] == dict.fromkeys((f"{job} | cuda" for job in jobs), fault)
        assert state["done"].keys() == {*jobs}
    else:
        assert state["bad"] == dict.fromkeys((f"{jobs[0]} | race", jobs[0], f"{jobs[2]} | cuda"), fault)
        assert state["done"].keys() == {*jobs[1:]}
        assert isinstance(state["done"][jobs[1]]["numbers"]["seconds"]["cuda"], list)


def test_what_hung_before_is_not_tried(environment: dict[str, str], tmp_path: Path) -> None:
    sanity = {
        "kl_gauss, float32 on cuda": ["HANG", "killed", "25.0 s"],
        "kl_gauss, float32 on triton": ["PASS", "", ""],
    }
    (tmp_path / "sanity.json").write_text(json.dumps(sanity))
    table = [sys.executable, "-m", "bench.gpu.measure", "table", str(tmp_path), "--only", "kl_gauss"]
    more = {"FASTVAE_TRIAL": "1", "MOCKED_GPU_FAULTS": "hang:cuda.kl_gauss"}
    result = subprocess.run(table, env=environment | more, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1
    assert "kl_gauss, forward, [1048576, 128]: cuda: HANG (as before: killed)" in result.stderr
    done = json.loads((tmp_path / "table.json").read_text())["done"]
    assert len(done) == 2
    assert all(row["numbers"]["seconds"]["triton"][0] > 0 for row in done.values())


def test_tests_that_hang(tmp_path: Path) -> None:
    """Tests that failed while others hang are in the summary; what comes next in the part is not started."""
    more = {"MOCKED_GPU_FAULTS": "hang:cuda.kl_gauss,raise:triton.kl_gauss", "FASTVAE_BUDGET": "30"}
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "libfastvae_cuda.so").touch()
    status, said = result(started("tests", tmp_path, **more))
    assert status == 1
    assert "s, TIMED OUT" in said
    assert said.count("FAILED tests/backends/test_on_gpu.py::test_cuda_graph[triton-kl_gauss]") == 1
    assert "memcheck: 0 s, NOT STARTED" in said


def test_no_profiler_and_no_library(tmp_path: Path) -> None:
    """A missing profiler and a missing library do not end the part; both are said, and the exit status is 1."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "cmake").symlink_to(MOCK / "bin" / "cmake")
    path = f"{tools}:/usr/bin:/bin"
    status, said = result(started("profile", tmp_path, MOCKED_GPU_FAULTS="build", PATH=path))
    assert status == 1
    assert "FAILED (1): kl_gauss.cu(1): error: mocked" in said
    assert said.count("FAILED (1): ncu is missing") == 2


def test_what_takes_too_long_is_kept_so_far(tmp_path: Path) -> None:
    more = {"MOCKED_GPU_FAULTS": "hang:cuda.agg_log_prob", "FASTVAE_STALL": "600", "FASTVAE_BUDGET": "12"}
    status, said = result(started("measure", tmp_path, **more))
    assert status == 1
    assert "FAILED determinism on cuda | agg_log_prob: out of time" in said
    done = json.loads(kept(tmp_path, "measure")["checks.json"])["done"]
    assert done.keys() == {"ceilings", "determinism on triton"}


def test_a_step_over_its_limit_is_killed(tmp_path: Path) -> None:
    library = tmp_path / "libfastvae_cuda.so"
    library.touch()
    more = {"MOCKED_GPU_FAULTS": "hang:triton.kl_gauss", "FASTVAE_BUDGET": "8", "FASTVAE_CUDA_LIBRARY": str(library)}
    status, said = result(started("profile", tmp_path, **more))
    assert status == 1
    assert re.search(r"^ncu-triton: \d+ s, TIMED OUT$", said, re.M)
    assert "ncu-cuda: 0 s, NOT STARTED, out of time" in said
    assert "KeyboardInterrupt" in kept(tmp_path, "profile")["ncu-triton.txt"]


def test_an_interruption(tmp_path: Path) -> None:
    process = started("sanity", tmp_path)
    archive = tmp_path / "out" / "sanity.tar.gz"
    until = time.monotonic() + 60
    while not (archive.exists() and "machine.txt" in kept(tmp_path, "sanity")) and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    status, said = result(process)
    assert status == 1
    assert "INTERRUPTED" in said
    assert {"machine.txt", "summary.txt"} <= kept(tmp_path, "sanity").keys()
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]
