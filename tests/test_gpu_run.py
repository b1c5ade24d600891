"""What is run on a GPU, rehearsed on a mocked one (mocked_gpu/), in processes of their own."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Of a machine with a GPU, and with a library of CUDA kernels."""
    library = tmp_path / "libfastvae_cuda.so"
    library.touch()
    changed = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "FASTVAE_BACKEND")}
    paths = {"PYTHONPATH": f"{ROOT / 'tests' / 'mocked_gpu'}:{ROOT}", "FASTVAE_CUDA_LIBRARY": str(library)}
    return changed | paths


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
    """It refuses what a GPU would, replays what was captured, and moves gradients with their tensors."""
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
        from fastvae import backends

        def results(device):
            torch.manual_seed(0)
            z, mu, logvar = (torch.randn(5, 3).to(device).requires_grad_() for _ in range(3))
            outputs = [
                fastvae.kl_gauss(mu, logvar),
                fastvae.reparameterize(mu, logvar, seed=1),
                *fastvae.sample_gauss(mu, logvar, 2, seed=1),
                fastvae.cross_log_prob(z, mu, logvar),
                fastvae.agg_log_prob(z, mu, logvar),
                *fastvae.agg_log_prob_marginals(z, mu, logvar),
            ]
            gradients = torch.autograd.grad([o.square().sum() for o in outputs], (z, mu, logvar))
            assert all(x.device == z.device for x in (*outputs, *gradients))
            return [x.detach().cpu() for x in (*outputs, *gradients)]

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
        from bench.early_exit import population
        from bench.inputs import samples_and_posteriors

        samples_and_posteriors(16, 8)
        population(16, 8, 4, -3.0)
    """
    run(program, environment, FASTVAE_BACKEND="cuda")
