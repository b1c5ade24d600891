"""Calls of public functions, run by `python -m bench.cpu.compare` with the fastvae that is on the path: reads lines
of a call's name and a number of runs, and answers each with a line of as many times in seconds. It imports
nothing of this folder, so that it runs with the fastvae of any revision."""

import inspect
import json
import sys
import time
from collections.abc import Callable
from typing import NamedTuple


class Call(NamedTuple):
    function: str
    B: int
    D: int
    backward: bool = False

    def __str__(self) -> str:
        return f"{self.function} [{self.B}, {self.D}], forward{' + backward' if self.backward else ''}"


SMALL = [  # of which what is around the kernel is a large part
    Call("kl_gauss", 128, 32, True),
    Call("reparameterize", 128, 32, True),
    Call("agg_log_prob", 256, 10),
    Call("agg_log_prob", 256, 10, True),
    Call("agg_log_prob_marginals", 64, 10),
]
LARGE = [
    Call("kl_gauss", 8192, 64, True),
    Call("reparameterize", 8192, 64),
    Call("reparameterize", 8192, 64, True),
    Call("sample_gauss", 8192, 64, True),
    Call("cross_log_prob", 1024, 32),
    Call("cross_log_prob", 1024, 32, True),
    Call("agg_log_prob", 2048, 32),
    Call("agg_log_prob", 2048, 32, True),
    Call("agg_log_prob", 2048, 128),
    Call("agg_log_prob_marginals", 1024, 32),
    Call("agg_log_prob_marginals", 1024, 32, True),
]
CALLS = {str(call): call for call in (*SMALL, *LARGE)}


def prepared(call: Call) -> Callable[[], object]:
    import torch

    import fastvae

    generator = torch.Generator().manual_seed(0)
    mu, logvar, eps = (torch.randn(call.B, call.D, generator=generator) for _ in range(3))
    logvar = logvar / 2 - 2
    function = getattr(fastvae, call.function)
    samples = [mu + eps * (logvar / 2).exp()] if "z" in inspect.signature(function).parameters else []
    inputs = [x.requires_grad_(call.backward) for x in (*samples, mu, logvar)]

    def results() -> list[torch.Tensor]:
        found = function(*inputs)
        return [found] if isinstance(found, torch.Tensor) else list(found)

    if not call.backward:
        return results
    upstream = [torch.ones_like(result) for result in results()]
    return lambda: torch.autograd.grad(results(), inputs, upstream)


def main() -> None:
    runs: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name, count = json.loads(line)
        if name not in runs:
            runs[name] = prepared(CALLS[name])
        times = []
        for _ in range(count):
            start = time.perf_counter()
            runs[name]()
            times.append(time.perf_counter() - start)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()
