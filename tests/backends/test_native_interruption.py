"""Signals while the native library computes: their handlers run, and what one raises ends the call and leaves nothing
behind. Calls would take seconds, here more than ten, and are interrupted soon after they have begun."""

import contextlib
import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Target, computing_on
from support.helpers import assert_same
from torch import Tensor

import fastvae
from fastvae.backends import interruption, native, native_library
from fastvae.backends.contract import Pairs

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends itself signals of POSIX")

BEGUN = 0.2  # seconds after which a call is at work
SOON = 2.0  # seconds of its thread's own time by which it has ended; others' time on a busy machine does not count


class Enough(Exception):
    pass


def raise_enough(*_: object) -> None:
    raise Enough


@pytest.fixture(autouse=True)
def _slowest_instruction_set() -> Iterator[None]:
    """So that calls are long; torch's threads are afterwards as many as before."""
    sets = native_library.instruction_sets() if not native_library.missing() else [None]
    threads = torch.get_num_threads()
    with computing_on(Target("native", sets[-1])):
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(threads)


@contextlib.contextmanager
def alarm(handler: Callable[..., Any], after: float = BEGUN, again: float = 0.0) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, after, again)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def assert_interrupted(call: Callable[[], object], after: float = BEGUN) -> None:
    begin = time.thread_time()
    with alarm(raise_enough, after), pytest.raises(Enough):
        call()
    assert time.thread_time() - begin < after + SOON


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float64)


def pairs(S: int, N: int, D: int) -> Pairs:
    return Pairs(zeros(S, D), zeros(N, D), zeros(N, D))


ALL = (True,) * 4
SEED = torch.tensor(1)
POSTERIORS = zeros(64, 1000), zeros(64, 1000)
LONG_CALLS: dict[str, Callable[[], object]] = {
    "agg_log_prob": lambda: native.agg_log_prob(pairs(40_000, 40_000, 32)),
    "agg_log_prob_backward": lambda: native.agg_log_prob_backward(zeros(40_000), None, pairs(40_000, 40_000, 32), ALL),
    "agg_log_prob_marginals": lambda: native.agg_log_prob_marginals(pairs(600, 100_000, 64)),
    "agg_log_prob_marginals_backward": lambda: native.agg_log_prob_marginals_backward(
        (zeros(600), zeros(600, 64)), zeros(600), zeros(600, 64), pairs(600, 50_000, 64), ALL
    ),
    "agg_entropy": lambda: native.agg_entropy(pairs(40_000, 40_000, 32)),
    "agg_entropy_backward": lambda: native.agg_entropy_backward(zeros(), pairs(40_000, 40_000, 32), ALL),
    "kl_decomposition": lambda: native.kl_decomposition(pairs(6_000, 6_000, 64)),
    "kl_decomposition_backward": lambda: native.kl_decomposition_backward(
        (zeros(), zeros(), zeros(), None, None, None, None),
        zeros(6_000),
        zeros(6_000, 64),
        pairs(6_000, 6_000, 64),
        ALL,
    ),
    "cross_log_prob": lambda: native.cross_log_prob(pairs(2000, 2000, 6000)),
    "cross_log_prob_backward": lambda: native.cross_log_prob_backward(
        torch.ones(2000, 2000, dtype=torch.float64), pairs(2000, 2000, 4000), ALL[:3]
    ),
    "sample_gauss": lambda: native.sample_gauss(*POSTERIORS, SEED, 20_000, (False, True, True, False, False), "sample"),
    "sample_gauss_backward": lambda: native.sample_gauss_backward(
        (None, None, zeros(20_000, 64), None), *POSTERIORS, SEED, None, 20_000, "sample", (True, True)
    ),
}


def short_call() -> list[Tensor]:
    """Takes part of a second, and some of it on all threads."""
    generator = torch.Generator("cpu").manual_seed(1)
    z, mu, logvar = (torch.randn(500, 20, generator=generator).requires_grad_() for _ in range(3))
    joint = fastvae.agg_log_prob(z, mu, logvar)
    return [joint.detach(), *torch.autograd.grad(joint.sum(), (z, mu, logvar))]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", LONG_CALLS)
def test_a_long_kernel(name: str, threads: int) -> None:
    """All but kl_gauss, whose inputs do not fit into memory where it takes seconds."""
    torch.set_num_threads(threads)
    expected = short_call()
    assert_interrupted(LONG_CALLS[name])
    assert_same(short_call(), expected)


def test_calls_until_the_last_one_is_interrupted() -> None:
    """Each of them takes less than the library waits before it asks again."""
    expected = short_call()
    results = []

    def many() -> None:
        while True:
            results.append(short_call())

    assert_interrupted(many)
    for result in results:
        assert_same(result, expected)


def test_a_backward() -> None:
    """The exception comes out of autograd's engine as it is."""
    z, mu, logvar = (x.requires_grad_() for x in pairs(20_000, 20_000, 32)[:3])
    native_library.use_instruction_set(None)  # the forward need not be long
    loss = fastvae.agg_log_prob(z, mu, logvar).sum()
    native_library.use_instruction_set(native_library.instruction_sets()[-1])
    assert_interrupted(loss.backward)
    assert z.grad is mu.grad is logvar.grad is None


def test_what_comes_through_torchs_dispatcher() -> None:
    z, mu, logvar = pairs(40_000, 40_000, 32)[:3]
    assert_interrupted(lambda: torch.func.grad(lambda z: fastvae.agg_log_prob(z, mu, logvar).sum())(z))


def test_expectation_maximization() -> None:
    """A mixture is as before, after `fit` and after `partial_fit`."""
    x = torch.randn(200_000, 8, generator=torch.Generator("cpu").manual_seed(1))
    mixture = fastvae.GaussianMixture(64, tol=0.0, max_iter=2, seed=1).fit(x[:1000])
    before = dict(vars(mixture))
    mixture.max_iter = 10**6
    assert_interrupted(lambda: mixture.fit(x))
    mixture.max_iter = 2
    assert vars(mixture) == before

    def stream() -> None:
        while True:
            mixture.partial_fit(x)

    assert_interrupted(stream)
    assert mixture.n_batches_ == mixture.n_iter_ - 2 == len(mixture.lower_bounds_) - 2
    again = fastvae.GaussianMixture(64, tol=0.0, max_iter=2, seed=1).fit(x[:1000])
    for _ in range(mixture.n_batches_):
        again.partial_fit(x)
    for name in ("weights_", "means_", "variances_"):
        assert torch.equal(getattr(mixture, name), getattr(again, name))


def test_a_pass_over_a_data_set() -> None:
    posteriors = np.zeros((100_000, 16)), np.zeros((100_000, 16))
    short = posteriors[0][:200], posteriors[1][:200]

    def terms() -> list[Tensor]:
        found = fastvae.kl_decomposition_dataset(short, seed=1)
        return [found.mi, found.tc, found.agg_kl]

    expected = terms()
    generator = torch.get_rng_state()
    assert_interrupted(lambda: fastvae.kl_decomposition_dataset(posteriors, method="direct", seed=1))
    assert_interrupted(lambda: fastvae.prior_hole(posteriors, seed=1))
    assert torch.equal(torch.get_rng_state(), generator)
    assert_same(terms(), expected)


# Handlers


def test_a_handler_that_returns_changes_nothing() -> None:
    """It may compute too."""
    short = pairs(500, 500, 20)
    z, mu, logvar = (torch.randn(4000, 32, generator=torch.Generator("cpu").manual_seed(n)) for n in range(3))

    def call() -> list[Tensor]:
        return native.agg_log_prob_backward(z[:, 0].contiguous(), None, Pairs(z, mu, logvar), ALL)

    expected = call()
    handled: list[Tensor] = []
    with alarm(lambda *_: handled.append(native.agg_log_prob(short)), after=0.05, again=0.1):
        while not handled:
            assert_same(call(), expected)
    assert_same(handled, [native.agg_log_prob(short)] * len(handled))


def test_the_exception_and_its_traceback() -> None:
    """They are what the handler made of them, and nobody keeps them."""

    def raising(*_: object) -> None:
        raise Enough("of it") from ValueError("its cause")

    with alarm(raising), pytest.raises(Enough, match="of it") as caught:
        LONG_CALLS["agg_log_prob"]()
    assert isinstance(caught.value.__cause__, ValueError)
    assert [frame.name for frame in traceback.extract_tb(caught.tb)][-4:] == ["_run", "settle", "raise_kept", "raising"]
    kept = weakref.ref(caught.value)
    del caught
    gc.collect()
    assert kept() is None


def test_two_signals_at_once() -> None:
    """What the second handler raises comes out. Neither is raised again in a later call."""

    def second(*_: object) -> None:
        raise Enough

    def first(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        raise TimeoutError

    before = signal.signal(signal.SIGUSR1, second)
    try:
        for _ in range(2):
            with alarm(first), pytest.raises(Enough):
                LONG_CALLS["agg_log_prob"]()
            test_calls_until_the_last_one_is_interrupted()
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert len(interruption._watches) == 1


def test_a_signal_while_the_library_gets_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second handler raises before the next kernel can be watched. That one runs to its end nevertheless."""
    renew, expected = interruption._renew, native.agg_log_prob(pairs(20_000, 6000, 32))

    def second(*_: object) -> None:
        raise TimeoutError

    def interrupted() -> None:
        monkeypatch.setattr(interruption, "_renew", renew)
        os.kill(os.getpid(), signal.SIGUSR1)
        renew()

    before = signal.signal(signal.SIGUSR1, second)
    try:
        monkeypatch.setattr(interruption, "_renew", interrupted)
        with alarm(raise_enough), pytest.raises(TimeoutError):
            LONG_CALLS["agg_log_prob"]()
        assert interruption._watches[-1].over
        assert_same([native.agg_log_prob(pairs(20_000, 6000, 32))], [expected])
        assert_interrupted(LONG_CALLS["agg_log_prob"])
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_handler_that_forks() -> None:
    """What it raises in the child, where one thread computes, comes out there."""
    torch.set_num_threads(1)
    parent, children = os.getpid(), []

    def fork(*_: object) -> None:
        children.append(os.fork())
        raise Enough("in the child" if children[0] == 0 else "in the parent")

    try:
        with alarm(fork), pytest.raises(Enough, match="in the parent"):
            LONG_CALLS["agg_log_prob"]()
    finally:
        if os.getpid() != parent:
            error = sys.exc_info()[1]
            os._exit(7 if isinstance(error, Enough) or "in the child" in str(error) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 7


def test_ctrl_c() -> None:
    """Of a whole program, which ends as one does that is interrupted in Python."""
    code = """
import signal, torch, fastvae
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
torch.set_num_threads(2)
z, mu, logvar = torch.zeros(3, 300_000, 32, dtype=torch.float64)
fastvae.agg_log_prob(z[:9], mu, logvar)
print("begun", flush=True)
fastvae.agg_log_prob(z, mu, logvar)
"""
    environment = {**os.environ, "FASTVAE_CPU_ISA": native_library.instruction_set()}
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "begun\n"
        time.sleep(BEGUN)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=30)  # of minutes
    assert child.returncode == -signal.SIGINT
    assert "ignored" not in errors
    assert "in _run\n" in errors
    assert errors.endswith("KeyboardInterrupt\n")


# Threads and children


def test_other_threads_are_not_interrupted() -> None:
    """Handlers run on the main thread alone, and interrupt what that one does."""
    x = pairs(4000, 4000, 32)
    expected = native.agg_log_prob(x)
    results: list[Tensor] = []
    thread = threading.Thread(target=lambda: results.extend(native.agg_log_prob(x) for _ in range(4)))
    thread.start()
    assert_interrupted(lambda: time.sleep(60))
    thread.join()
    assert_same(results, [expected] * 4)


def _in_child(x: Pairs, expected: list[Tensor]) -> None:
    assert_interrupted(lambda: native.agg_log_prob(x))
    assert_same(short_call(), expected)
    os._exit(0)


@pytest.mark.parametrize("on_main_thread", [True, False])
def test_forked_child(on_main_thread: bool) -> None:
    """Its main thread is the one that has forked."""
    # Torch itself hangs in a child where it uses several threads there, as it does to write to 32,768 elements or more.
    x, expected = pairs(20_000, 80_000, 32), short_call()
    codes: list[int | None] = []

    def fork() -> None:
        child = multiprocessing.get_context("fork").Process(target=_in_child, args=(x, expected))
        child.start()
        child.join(timeout=60)
        child.kill()
        codes.append(child.exitcode)

    if on_main_thread:
        fork()
    else:
        thread = threading.Thread(target=fork)
        thread.start()
        thread.join()
    assert codes == [0]
    assert_interrupted(lambda: native.agg_log_prob(x))
