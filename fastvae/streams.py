"""Posteriors of more examples than fit into memory, read a few rows at a time; and a bar that shows how far it is."""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .backends.contract import accumulation_dtype
from .ops._checks import check_count, check_posterior

MOST_SAMPLES = 2**40  # more than fit into any memory, few enough for their bytes to be counted in 64 bits
Array = Tensor | np.ndarray
Rows = slice | np.ndarray


class Posteriors(NamedTuple):
    """mu and logvar, `[N, D]` each, on any device, in memory or mapped into it, and where to compute with them."""

    mu: Array
    logvar: Array
    device: torch.device

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of some rows, in the dtype of sums."""
        return _read(self.mu, rows, self.device), _read(self.logvar, rows, self.device)

    def choose(self, rows: int | Tensor | None, seed: int) -> Rows:
        """All rows, as many drawn without replacement, or those of an int64 tensor."""
        N = len(self.mu)
        if rows is None:
            return slice(None)
        check_rows(rows)
        if not isinstance(rows, Tensor):
            if rows > N:
                raise ValueError(f"rows: expected at most the {N} posteriors, got {rows}")
            return np.sort(np.random.default_rng(seed).choice(N, rows, replace=False, shuffle=False))
        if rows.max() >= N:
            raise ValueError(f"rows: expected row numbers from 0 to {N - 1}, got {int(rows.max())}")
        return rows.cpu().numpy()


def check_values(name: str, x: Tensor) -> None:
    """There are some to look at."""
    if x.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")


def check_rows(rows: int | Tensor | None) -> None:
    """What can be known of them before the posteriors are counted."""
    if rows is None:
        return
    if not isinstance(rows, Tensor):
        check_count("rows", rows, least=1)
    elif rows.dtype != torch.int64:
        raise TypeError(f"rows: expected an int or an int64 tensor, got {rows.dtype}")
    elif rows.ndim != 1 or len(rows) == 0 or rows.min() < 0:
        raise ValueError(f"rows: expected row numbers from 0 in a tensor [R], got {rows}")


def open_posteriors(
    source: Any, encoder: Any, *, chunk_size: int, device: torch.device | str | None, progress: bool
) -> Posteriors:
    """The posteriors of `kl_decomposition_dataset`: a pair of tensors or arrays as it is; batches gone through once,
    and an array of inputs `chunk_size` rows at a time."""
    if encoder is not None and not callable(encoder):
        raise TypeError(f"encoder: expected a function or module from x to (mu, logvar), got {type(encoder).__name__}")
    pair = encoder is None and isinstance(source, tuple | list) and len(source) == 2
    if pair and all(isinstance(x, Array) for x in source):
        mu, logvar = source
        if mu.ndim != 2 or mu.shape != logvar.shape or len(mu) == 0:
            shapes = f"{tuple(mu.shape)} and {tuple(logvar.shape)}"
            raise ValueError(f"posteriors: expected mu and logvar of one shape [N, D], got {shapes}")
        home = device or (mu.device if isinstance(mu, Tensor) else "cpu")
        posteriors = Posteriors(mu, logvar, torch.device(home))
    elif isinstance(source, Iterable) and (encoder is not None or not isinstance(source, Array)):
        if isinstance(source, Array):
            source = [source[first : first + chunk_size] for first in range(0, len(source), chunk_size)]  # views
        posteriors = _spool(shown(source, "encoding", progress), encoder, device)
    else:
        expected = "a pair (mu, logvar), or batches of them" if encoder is None else "batches of inputs"
        raise TypeError(f"posteriors: expected {expected}, got {type(source).__name__}")
    check_posterior(*posteriors.read(slice(0, 1)))
    return posteriors


def _spool(batches: Iterable[Any], encoder: Any, device: torch.device | str | None) -> Posteriors:
    """The posteriors of all batches, written to temporary files that are then mapped into memory."""
    first: Tensor | None = None
    N = 0
    with tempfile.TemporaryFile() as mu_file, tempfile.TemporaryFile() as logvar_file:
        for batch in batches:
            if encoder is not None:
                x = batch[0] if isinstance(batch, tuple | list) and len(batch) > 0 else batch
                if not isinstance(x, Array):
                    expected = "batches x, or (x, labels), of tensors or arrays"
                    raise TypeError(f"posteriors: expected {expected}, got {type(x).__name__}")
                x = _tensor(x)
                batch = encoder(x if device is None else x.to(device))
            if not (isinstance(batch, tuple | list) and len(batch) == 2):
                raise TypeError(f"posteriors: expected batches of pairs (mu, logvar), got {type(batch).__name__}")
            mu, logvar = (_tensor(x) for x in batch)
            check_posterior(mu, logvar, min_ndim=2)
            first = mu if first is None else first
            if mu.ndim != 2 or mu.shape[1] != first.shape[1]:
                raise ValueError(f"posteriors: expected batches [B, {first.shape[-1]}], got {tuple(mu.shape)}")
            for file, x in ((mu_file, mu), (logvar_file, logvar)):
                file.write(x.to("cpu", accumulation_dtype(first.dtype)).contiguous().numpy().data)
            N += len(mu)
        if first is None or N == 0:
            raise ValueError("posteriors: expected at least one, got none")
        dtype, shape = np.float64 if first.dtype == torch.float64 else np.float32, (N, first.shape[1])
        maps = [np.memmap(file, dtype, "r", shape=shape) for file in (mu_file, logvar_file)]
    return Posteriors(maps[0], maps[1], torch.device(device or first.device))


def _read(x: Array, rows: Rows, device: torch.device) -> Tensor:
    part = _tensor(x[rows])
    return part.to(device, accumulation_dtype(part.dtype) if part.is_floating_point() else part.dtype)


def _tensor(x: Any) -> Any:
    """An array as a tensor: copied, as it may be mapped and not be written to. Anything else as it is."""
    if not isinstance(x, np.ndarray):
        return x
    try:
        return torch.from_numpy(np.array(x))
    except TypeError:
        raise TypeError(f"posteriors: expected arrays of a dtype that torch knows, got {x.dtype}") from None


def shown(steps: Iterable[Any], name: str, progress: bool) -> Iterable[Any]:
    """The steps, on a bar on stderr if wanted: tqdm's where it is installed."""
    if not progress:
        return steps
    try:
        from tqdm import tqdm
    except ImportError:
        return _counted(steps, name)
    return tqdm(steps, desc=name)


def _counted(steps: Iterable[Any], name: str) -> Iterator[Any]:
    total = f" of {len(steps)}" if isinstance(steps, Sized) else ""
    for n, step in enumerate(steps, 1):
        yield step
        print(f"\r{name}: {n}{total}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
