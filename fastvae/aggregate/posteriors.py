"""Posteriors of more examples than fit into memory, read a few rows at a time; and a progress bar."""

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backends.contract import accumulation_dtype
from ..ops.checks import check_count, check_indices, check_posterior, check_tensor, check_values

Array = Tensor | np.ndarray
Rows = slice | np.ndarray


class Posteriors(NamedTuple):
    """mu and logvar, `[N, D]` each, on any device, in memory or mapped into it, and the device to compute on."""

    mu: Array
    logvar: Array
    device: torch.device

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of some rows, in the accumulation dtype."""
        return _read(self.mu, rows, self.device), _read(self.logvar, rows, self.device)

    def choose(self, rows: int | Tensor | None, seed: int) -> Rows:
        """Row numbers: all for None, as many as an int, drawn without replacement, or those of an int64 tensor."""
        N = len(self.mu)
        if rows is None:
            return slice(None)
        rows = check_rows(rows)
        if not isinstance(rows, Tensor):
            if rows > N:
                raise ValueError(f"rows: expected at most the {N} posteriors, got {rows}")
            return np.sort(np.random.default_rng(seed).choice(N, rows, replace=False, shuffle=False))
        if rows.max() >= N:
            raise ValueError(f"rows: expected row numbers from 0 to {N - 1}, got {int(rows.max())}")
        return rows.cpu().numpy()


def check_rows(rows: Any) -> Any:
    """Check `rows` as far as possible before the posteriors are counted: None, an int, or an int64 tensor."""
    if rows is None:
        return None
    if not isinstance(rows, Tensor):
        return check_count("rows", rows, least=1)
    check_indices("rows", rows)
    check_values("rows", rows)
    if rows.ndim != 1 or len(rows) == 0:
        raise ValueError(f"rows: expected row numbers in a tensor [R], got shape {tuple(rows.shape)}")
    if rows.min() < 0:
        raise ValueError(f"rows: expected row numbers from 0, got {int(rows.min())}")
    return rows


def check_place(device: Any) -> torch.device | None:
    """Check that `device` is one to compute on; None stands for where the posteriors are."""
    if device is None:
        return None
    try:
        place = torch.empty(0, dtype=torch.float32, device=device).device
    except (TypeError, AttributeError):
        raise TypeError(f"device: expected a torch.device or its name, got {type(device).__name__}") from None
    except (RuntimeError, AssertionError, ValueError, OverflowError) as error:
        raise ValueError(f"device: expected one that is here, got {device!r}: {error}") from None
    if place.type == "meta":
        raise ValueError("device: expected one that holds values, got 'meta'")
    return place


def open_posteriors(
    source: Any, encoder: Any, *, chunk_size: int, device: torch.device | str | None, progress: bool
) -> Posteriors:
    """Open the posteriors of `kl_decomposition_dataset`: a pair of tensors or arrays as it is, batches by reading them
    once, and an array of inputs `chunk_size` rows at a time."""
    device = check_place(device)
    if encoder is not None and not callable(encoder):
        raise TypeError(f"encoder: expected a function or module from x to (mu, logvar), got {type(encoder).__name__}")
    pair = encoder is None and isinstance(source, tuple | list) and len(source) == 2
    if pair and all(isinstance(x, Array) for x in source):
        mu, logvar = source
        for name, x in (("mu", mu), ("logvar", logvar)):
            if isinstance(x, Tensor):
                check_tensor(name, x, min_ndim=0)
                check_values(name, x)
        if mu.ndim != 2 or mu.shape != logvar.shape or 0 in mu.shape:
            shapes = f"{tuple(mu.shape)} and {tuple(logvar.shape)}"
            raise ValueError(f"posteriors: expected mu and logvar of one shape [N, D], not empty, got {shapes}")
        home = device or (mu.device if isinstance(mu, Tensor) else "cpu")
        posteriors = Posteriors(mu, logvar, torch.device(home))
    elif isinstance(source, Iterable) and (encoder is not None or not isinstance(source, Array)):
        if isinstance(source, Array):
            if isinstance(source, Tensor):
                if source.layout != torch.strided or source.is_nested:
                    raise TypeError(f"posteriors: expected a dense tensor of inputs, got {source.layout} or nested")
                check_values("posteriors", source)
            if source.ndim == 0:
                raise ValueError("posteriors: expected inputs [N, ...], got shape ()")
            source = [source[first : first + chunk_size] for first in range(0, len(source), chunk_size)]  # views
        posteriors = _spool(shown(source, "encoding", progress), encoder, device)
    else:
        expected = "a pair (mu, logvar), or batches of them" if encoder is None else "batches of inputs"
        raise TypeError(f"posteriors: expected {expected}, got {type(source).__name__}")
    check_posterior(*posteriors.read(slice(0, 1)))
    return posteriors


def _spool(batches: Iterable[Any], encoder: Any, device: torch.device | str | None) -> Posteriors:
    """Write the posteriors of all batches to temporary files, and map these into memory."""
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
                check_values("posteriors", x)
                batch = encoder(x if device is None else x.to(device))
            if not (isinstance(batch, tuple | list) and len(batch) == 2):
                raise TypeError(f"posteriors: expected batches of pairs (mu, logvar), got {type(batch).__name__}")
            mu, logvar = (_tensor(x) for x in batch)
            check_posterior(mu, logvar, min_ndim=2)
            first = mu if first is None else first
            if mu.ndim != 2 or mu.shape[1] != first.shape[1] or mu.shape[1] == 0:
                raise ValueError(f"posteriors: expected batches [B, {first.shape[-1] or 'D'}], got {tuple(mu.shape)}")
            for name, file, x in (("mu", mu_file, mu), ("logvar", logvar_file, logvar)):
                check_values(name, x)
                x.to("cpu", accumulation_dtype(first.dtype)).contiguous().numpy(force=True).tofile(file)
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
    """Convert an array to a tensor: a copy, as the array may be mapped and read-only, or have its bytes in the other
    order. Anything else is returned as it is."""
    if not isinstance(x, np.ndarray):
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError("posteriors: expected arrays without a mask, which would be lost, got a masked array")
    try:
        return torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise TypeError(f"posteriors: expected arrays of a dtype that torch knows, got {x.dtype}") from None


def shown(steps: Iterable[Any], name: str, progress: bool) -> Iterable[Any]:
    """The steps, with a progress bar on stderr if wanted, tqdm's where it is installed."""
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
