"""Posteriors of more examples than fit into memory, read a few rows at a time; and a progress bar."""

import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..backends.contract import accumulation_dtype
from ..ops.checks import check_count, check_dense, check_indices, check_posterior, check_tensor, check_values

Array = Tensor | np.ndarray
Rows = slice | np.ndarray


class Posteriors(NamedTuple):
    """mu and logvar, `[N, D]` each, on any device, in memory or mapped into it, and the device to compute on."""

    mu: Array
    logvar: Array
    device: torch.device

    def read(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(mu, logvar) of some rows, in the accumulation dtype."""
        return self.means(rows), _read(self.logvar, rows, self.device)

    def means(self, rows: Rows) -> Tensor:
        """mu alone, likewise."""
        return _read(self.mu, rows, self.device)

    def choose(self, rows: int | Tensor | None, seed: int) -> Rows:
        """Row numbers: all for None, as many as an int, drawn without replacement, or those of an int64 tensor."""
        N = len(self.mu)
        if rows is None:
            return slice(None)
        rows = check_rows(rows)
        if not isinstance(rows, Tensor):
            if rows > N:
                raise ValueError(f"rows: expected at most the {N} posteriors, got {rows}")
            return np.sort(np.random.default_rng(seed % 2**64).choice(N, rows, replace=False, shuffle=False))
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
    source: Any,
    data: Any = None,
    *,
    batch_size: int = 4096,
    device: torch.device | str | None = None,
    progress: bool = False,
    least: int = 1,
) -> Posteriors:
    """Open a data set's posteriors. All functions of data sets take one as (source, data), and read both here alone.

    Args:
        source, data: as in `kl_decomposition_dataset`.
        batch_size: how many rows of an array are encoded at once.
        device: where to encode and compute; None for where a module's parameters, or else the posteriors, are.
        progress: show a progress bar on stderr while batches are read.
        least: how many posteriors there must be.
    """
    device = check_place(device)
    encode = _encoder(source, data)
    if encode is None:
        posteriors = _of_pairs(source, device, progress)
    else:
        if device is None and isinstance(source, torch.nn.Module):
            device = next((p.device for p in source.parameters()), None)
        batches = shown(_batches_of_inputs(data, batch_size), "encoding", progress)
        posteriors = _spool(_encoded(batches, encode, device), "data", device)
    check_posterior(*posteriors.read(slice(0, 1)))
    if len(posteriors.mu) < least:
        raise ValueError(f"source: expected at least {least} posteriors, got {len(posteriors.mu)}")
    return posteriors


def _is_vae(source: Any) -> bool:
    """Whether a source is a VAE: an object with a method `encode`."""
    return callable(getattr(source, "encode", None)) and not isinstance(source, str | type)


def prior_of(source: Any, prior: Any) -> Any:
    """The prior that is given, or else the VAE's, if `source` is one; None stands for N(0, I)."""
    of_vae = getattr(source, "prior", None) if prior is None and _is_vae(source) else None
    return of_vae if hasattr(of_vae, "log_prob") else prior


def _encoder(source: Any, data: Any) -> Callable[[Any], Any] | None:
    """What encodes `data`; None where `source` has the posteriors themselves."""

    def of(x: Any) -> Callable[[Any], Any] | None:
        if _is_vae(x):
            return x.encode
        return x if callable(x) and not isinstance(x, type) else None

    encode = of(source)
    if data is None:
        if encode is None or (isinstance(source, Iterable) and not isinstance(source, torch.nn.Module)):
            return None
        raise ValueError(f"data: expected the inputs to encode, as source is a {type(source).__name__}, got None")
    if encode is None:
        swapped = f"; as data is a {type(data).__name__}, give it first" if of(data) is not None else ""
        raise TypeError(
            f"source: expected a VAE, or an encoder from x to (mu, logvar), where data is given, got"
            f" {type(source).__name__}{swapped}"
        )
    return encode


def _of_pairs(source: Any, device: torch.device | None, progress: bool) -> Posteriors:
    """Open the posteriors themselves: one pair as it is, batches of pairs by reading them once."""
    if isinstance(source, tuple | list) and len(source) == 2 and all(isinstance(x, Array) for x in source):
        mu, logvar = source
        for name, x in (("mu", mu), ("logvar", logvar)):
            if isinstance(x, Tensor):
                check_tensor(name, x, min_ndim=0)
                check_values(name, x)
        if mu.ndim != 2 or mu.shape != logvar.shape or 0 in mu.shape:
            shapes = f"{tuple(mu.shape)} and {tuple(logvar.shape)}"
            raise ValueError(f"source: expected mu and logvar of one shape [N, D], not empty, got {shapes}")
        home = device or (mu.device if isinstance(mu, Tensor) else "cpu")
        return Posteriors(mu, logvar, torch.device(home))
    if isinstance(source, Array) or not isinstance(source, Iterable):
        expected = "a pair (mu, logvar), or batches of them; or, with data, a VAE or an encoder"
        raise TypeError(f"source: expected {expected}, got {type(source).__name__}")
    return _spool(shown(source, "encoding", progress), "source", device)


def _batches_of_inputs(data: Any, batch_size: int) -> Iterable[Any]:
    """The batches of `data`; a tensor or an array in views of `batch_size` rows."""
    if not isinstance(data, Array):
        if isinstance(data, Iterable):
            return data
        expected = "inputs to encode: a tensor, an array, or batches of them"
        raise TypeError(f"data: expected {expected}, got {type(data).__name__}")
    if isinstance(data, Tensor):
        check_dense("data", data)
        check_values("data", data)
    if data.ndim == 0:
        raise ValueError("data: expected inputs [N, ...], got shape ()")
    return [data[first : first + batch_size] for first in range(0, len(data), batch_size)]


def _encoded(batches: Iterable[Any], encode: Callable[[Any], Any], device: torch.device | None) -> Iterator[Any]:
    """Yield what `encode` makes of each batch x, or (x, labels)."""
    for batch in batches:
        x = batch[0] if isinstance(batch, tuple | list) and len(batch) > 0 else batch
        if not isinstance(x, Array):
            expected = "batches x, or (x, labels), of tensors or arrays"
            raise TypeError(f"data: expected {expected}, got {type(x).__name__}")
        x = _tensor(x, "data")
        check_values("data", x)
        yield encode(x if device is None else x.to(device))


def _spool(pairs: Iterable[Any], name: str, device: torch.device | None) -> Posteriors:
    """Write pairs (mu, logvar), batch by batch, to temporary files, and map these into memory. They come from the
    argument `name`."""
    first: Tensor | None = None
    N = 0
    with tempfile.TemporaryFile() as mu_file, tempfile.TemporaryFile() as logvar_file:
        for pair in pairs:
            if not (isinstance(pair, tuple | list) and len(pair) == 2):
                expected = "pairs (mu, logvar), batch by batch" if name == "source" else "an encoder to (mu, logvar)"
                raise TypeError(f"source: expected {expected}, got {type(pair).__name__}")
            mu, logvar = (_tensor(x) for x in pair)
            check_posterior(mu, logvar, min_ndim=2)
            first = mu if first is None else first
            if mu.ndim != 2 or mu.shape[1] != first.shape[1] or mu.shape[1] == 0:
                raise ValueError(f"source: expected batches [B, {first.shape[-1] or 'D'}], got {tuple(mu.shape)}")
            for part, file, x in (("mu", mu_file, mu), ("logvar", logvar_file, logvar)):
                check_values(part, x)
                x.to("cpu", accumulation_dtype(first.dtype)).contiguous().numpy(force=True).tofile(file)
            N += len(mu)
        if first is None or N == 0:
            raise ValueError(f"{name}: expected at least one {'example' if name == 'data' else 'posterior'}, got none")
        dtype, shape = np.float64 if first.dtype == torch.float64 else np.float32, (N, first.shape[1])
        maps = [np.memmap(file, dtype, "r", shape=shape) for file in (mu_file, logvar_file)]
    return Posteriors(maps[0], maps[1], torch.device(device or first.device))


def _read(x: Array, rows: Rows, device: torch.device) -> Tensor:
    part = _tensor(x[rows])
    return part.to(device, accumulation_dtype(part.dtype) if part.is_floating_point() else part.dtype)


def _tensor(x: Any, name: str = "source") -> Any:
    """Convert an array of the argument `name` to a tensor: a copy, as the array may be mapped and read-only, or have
    its bytes in the other order. Anything else is returned as it is."""
    if not isinstance(x, np.ndarray):
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected arrays without a mask, which would be lost, got a masked array")
    try:
        return torch.from_numpy(np.array(x, dtype=x.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise TypeError(f"{name}: expected arrays of a dtype that torch knows, got {x.dtype}") from None


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
