"""Signals while a kernel of the native library computes, Ctrl-C above all. The library asks now and then, on Python's
main thread, and their handlers run; what one of them raises ends the kernel, and comes out of its call."""

import ctypes
import functools
import inspect
import os
import threading
from collections.abc import Generator
from ctypes import c_int, c_uint64
from typing import Any

INTERRUPTED = 2  # a kernel's status, FASTVAE_INTERRUPTED
POLL = ctypes.CFUNCTYPE(c_int)  # what fastvae_poll takes

_poll: Any = None
_watches: list["_Watch"] = []  # the last is the one that the library asks


def _handlers(raised: list[BaseException]) -> Generator[int, None, None]:
    """Yield 0 until a handler raises.

    Handlers of signals that have come run where a generator goes on, which is within the `try`. Where a function begins
    they would run before it, and ctypes would print what they raise, and drop it.
    """
    try:
        while True:
            yield 0
    except BaseException as error:
        raised += [error]


class _Watch:
    """Runs handlers until one raises, and keeps that."""

    def __init__(self) -> None:
        self.raised: list[BaseException] = []
        self._handlers = _handlers(self.raised)
        next(self._handlers)
        self.ask = POLL(functools.partial(next, self._handlers, 1))  # 1 from the end on

    @property
    def over(self) -> bool:
        return inspect.getgeneratorstate(self._handlers) == inspect.GEN_CLOSED


def watch(library: ctypes.CDLL) -> None:
    """Have the library ask from now on, in forked children too."""
    global _poll
    library.fastvae_poll.restype = None
    library.fastvae_poll.argtypes = (POLL, c_uint64)
    _poll = library.fastvae_poll
    _renew()
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_renew)


def _renew() -> None:
    new = _Watch()
    _watches.append(new)  # before the library may call it, as it must not be freed then
    _poll(new.ask, threading.main_thread().ident)


def settle(status: int) -> None:
    """After a kernel that gave this status and not 0: raise what ended it, or return for it to run again."""
    if status != INTERRUPTED:
        raise MemoryError("fastvae: no memory for the kernel's workspace")
    raise_kept()


def raise_kept() -> None:
    """Raise the exception that ended a kernel, with the traceback that it has from the handler on. There is none where
    another signal's handler raised before all was ready for this kernel: be ready then."""
    for watch in reversed(_watches):  # in a child that a handler forked, it is not the last that has it
        if watch.raised:
            error = watch.raised.pop()
            raise error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
    forget()


def forget() -> None:
    """Be ready for the next call, whatever came out of this one: another handler may have raised on the way."""
    if threading.get_ident() == threading.main_thread().ident and _watches[-1].over:
        _renew()
        _watches[:] = [watch for watch in _watches if not watch.over]
