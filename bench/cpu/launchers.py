"""What a launch on a GPU takes of the host's time, measured without one: the functions of the contract, by the backends
`triton` and `cuda`, with the launch itself replaced by nothing.

    python -m bench.cpu.launchers [--rounds 31]

Inputs are [256, 32] float32 tensors of the CPU, where an allocation takes about as long as it does where torch's
allocator for GPUs has the memory at hand; all gradients are asked for. Microseconds a call, medians over rounds of 200
calls in which all take turns. Of `triton`: as it is written, and replayed (kernels/triton/_replay.py).
"""

import argparse
import ctypes
import functools
from collections.abc import Callable
from ctypes import c_int, c_void_p
from typing import Any

import torch

from fastvae.backends import composed, cuda, settings, triton
from fastvae.backends.c_interface import CUDA_FUNCTIONS
from fastvae.backends.contract import TERMS, LogWeights, Pairs

from ..harness import in_turns

B, D, CALLS = 256, 32, 200
TARGETS = {
    "kl_gauss": 12,
    "sample_gauss, z and the KL": 25,
    "agg_log_prob": 30,
    "agg_log_prob_backward": 60,
    "agg_log_prob_marginals_backward": 90,
}


def calls() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """By what a row is called, the function of the contract and its arguments."""
    mu, logvar, z, d_z = (torch.randn(B, D) for _ in range(4))
    seed, one = torch.tensor(7), torch.ones(())
    joint, marginals = torch.zeros(B), torch.zeros(B, D)
    own = torch.arange(B)
    pairs = Pairs(z, mu, logvar, LogWeights())
    stratified = Pairs(z, mu, logvar, LogWeights(None, -9.0, own, -11.0, -10.0))
    both, each = (True, True), (True, True, True, False)
    upstream = [torch.ones(D if name == "dim_kl" else ()) for name in TERMS[:-1]]
    none = (None, None)
    return {
        "kl_gauss": ("kl_gauss", (mu, logvar, *none, "batchmean")),
        "kl_gauss_backward": ("kl_gauss_backward", (one, mu, logvar, *none, "batchmean", (*both, False, False))),
        "sample_gauss, z alone": ("sample_gauss", (mu, logvar, seed, 1, (True, False, False, False, False), "sample")),
        "sample_gauss_backward, z alone": (
            *("sample_gauss_backward", ((d_z[None], None, None, None), mu, logvar, seed, None, 1, "sample", both)),
        ),
        "sample_gauss, z and the KL": (
            "sample_gauss",
            (mu, logvar, seed, 1, (True, False, False, True, False), "batchmean"),
        ),
        "sample_gauss_backward, z and the KL": (
            *("sample_gauss_backward", ((d_z[None], None, None, one), mu, logvar, seed, None, 1, "batchmean", both)),
        ),
        "agg_log_prob": ("agg_log_prob", (pairs,)),
        "agg_log_prob_backward": ("agg_log_prob_backward", (joint, joint + 1, pairs, each)),
        "agg_log_prob_marginals": ("agg_log_prob_marginals", (pairs,)),
        "agg_log_prob_marginals_backward": (
            *("agg_log_prob_marginals_backward", ((joint, marginals), joint + 1, marginals + 1, pairs, each)),
        ),
        "agg_entropy, own weights": ("agg_entropy", (stratified,)),
        "agg_entropy_backward, own weights": ("agg_entropy_backward", (one, stratified, each)),
        "kl_decomposition, own weights": ("kl_decomposition", (stratified,)),
        "kl_decomposition_backward, own weights": (
            *("kl_decomposition_backward", (upstream, joint, marginals, stratified, each)),
        ),
    }


class NoGPU:
    """A driver of Triton's, for an H100 that does nothing."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


class NoBinary:
    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, stream=None: None


class NoLibrary:
    """The CUDA library, whose functions are C's `abs`: it gives their first argument, float32's code 0, as status 0."""

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_workspace"):
            return lambda *sizes: 4096
        function = ctypes.CDLL(None)["abs"]
        function.argtypes = (c_int, *CUDA_FUNCTIONS[name.removeprefix("fastvae_cuda_")], c_void_p)
        return function


class Launchers:
    """The backend `triton` on a GPU that is not there; each function is first changed by `change`."""

    def __init__(self, change: Callable[[Callable[..., Any]], Callable[..., Any]]):
        self.change = change

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if not hasattr(triton, name):
            raise AttributeError(name)
        function = self.change(triton.on_current_device(name))
        setattr(self, name, function)
        return function


def backends() -> dict[str, Any]:
    """Those that launch nothing."""
    from fastvae.kernels.triton._replay import replay
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    driver.set_active(NoGPU())
    JITFunction.run = lambda *_, **__: NoBinary()
    cuda.library = NoLibrary  # type: ignore[assignment]
    cuda.simulated = lambda: True  # type: ignore[assignment]
    return {
        "triton": Launchers(lambda launcher: functools.partial(replay, launcher, settings.current)),
        "triton, not replayed": Launchers(lambda launcher: launcher),
        "cuda": cuda,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    found = backends()
    print(f"| us | {' | '.join(found)} | target |")
    print(f"|---|{'--:|' * (len(found) + 1)}")
    for row, (name, arguments) in calls().items():
        functions = [composed.function(backend, name) for backend in found.values()]
        runs = [functools.partial(many, function, arguments) for function in functions]
        for run in runs:
            run()
        times = [f"{1e6 * t / CALLS:.0f}" for t in in_turns(rounds, *runs)]
        print(f"| {row} | {' | '.join(times)} | {TARGETS.get(row, '')} |", flush=True)


def many(function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    for _ in range(CALLS):
        function(*arguments)


if __name__ == "__main__":
    main()
