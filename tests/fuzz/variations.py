"""Variations of a good call: the same arguments in unusual forms, one that is wrong, and what it finds around it."""

import contextlib
import decimal
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from calls import Draw
from support.helpers import LAYOUTS
from torch import Tensor, nn

# Forms of a tensor, with the same values.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: form for name, form in LAYOUTS.items() if "expanded" not in name},
    "parameter": lambda x: nn.Parameter(x.clone(), requires_grad=False),
    "row of a stack": lambda x: torch.stack((x, x, x))[1],
    "strided": lambda x: torch.stack((x, x), 0).movedim(0, -1)[..., 1],
}


def formed(draw: Draw, x: Tensor) -> tuple[str, Tensor]:
    """The same numbers in another form, those that are expanded too, and the form's name."""
    if x.ndim and x.numel() and (x == x[:1]).all():
        return "expanded", x[:1].expand_as(x)
    name = draw.choice(list(FORMS))
    if x.ndim < 2 and name in ("transposed", "chunked", "every third"):
        name = "contiguous"
    if name == "negated" and x.dtype not in (torch.float32, torch.float64):
        name = "unaligned"
    return name, FORMS[name](x)


def disguised(draw: Draw, value: Any, either: bool) -> tuple[str, Any]:
    """The same argument in another type or form, and what to call it; usually as it is. One that may be a number or a
    tensor does not become a tensor of no axes."""
    if isinstance(value, Tensor):
        name, x = formed(draw, value) if draw.chance(0.5) else ("", value)
        return f"{value.dtype}{list(value.shape)} {name}".rstrip().removeprefix("torch."), x
    if draw.chance(0.25) and not isinstance(value, bool):
        forms: list[Any] = []
        if isinstance(value, int):
            kinds = (np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint64)
            forms = [kind(value) for kind in kinds if np.iinfo(kind).min <= value <= np.iinfo(kind).max]
        elif isinstance(value, float) and math.isfinite(value):
            forms = [np.float64(value), Fraction(value)]
            forms += [] if either else [torch.tensor(value, dtype=torch.float64)]
            forms += [np.float32(value)] if float(np.float32(value)) == value else []
            forms += [int(value)] if value == int(value) else []
        if forms:
            value = draw.choice(forms)
    return f"{type(value).__name__} {value!r}" if isinstance(value, np.generic) else shown(value), value


def shown(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "nested" if value.is_nested else f"{list(value.shape)} {value.layout}".replace(" torch.strided", "")
        return f"{value.dtype}{layout} on {value.device}".removeprefix("torch.")
    if isinstance(value, int) and value.bit_length() > 256:
        return "10**400"
    return repr(value)[:60]


def _edited(x: Tensor, number: float) -> Tensor:
    y = x.clone()
    if y.numel():
        y.view(-1)[y.numel() // 2] = number
    return y


WRONG_TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "None": lambda x: None,
    "a string": lambda x: "mu",
    "a number": lambda x: 1.0,
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.double().numpy(),
    "an object": lambda x: object(),
    "int64": lambda x: x.nan_to_num(0).clamp(-9, 9).long(),
    "int32": lambda x: x.nan_to_num(0).clamp(-9, 9).int(),
    "bool": lambda x: x != 0,
    "complex": lambda x: torch.complex(x.float(), x.float()),
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr() if x.ndim == 2 else x.to_sparse(),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "quantized": lambda x: torch.quantize_per_tensor(x.float().nan_to_num(0), 0.1, 0, torch.qint8),
    "float8": lambda x: x.float().to(torch.float8_e5m2),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "meta": lambda x: x.to("meta"),
    "one axis more": lambda x: x[None],
    "two axes more": lambda x: x[None, None],
    "one axis less": lambda x: x.sum(0) if x.ndim else x,
    "a scalar": lambda x: x.sum(),
    "one row more": lambda x: torch.cat((x, x[:1])) if x.ndim else x,
    "one row less": lambda x: x[1:] if x.ndim else x,
    "one column more": lambda x: torch.cat((x, x[..., :1]), -1) if x.ndim else x,
    "no rows": lambda x: x[:0] if x.ndim else x,
    "no columns": lambda x: x[..., :0] if x.ndim else x,
    "2**40 empty rows": lambda x: x.new_empty(2**40, 0),
    "transposed": lambda x: x.mT if x.ndim > 1 else x,
    "NaN": lambda x: _edited(x, math.nan) if x.is_floating_point() else x + 2**40,
    "infinity": lambda x: _edited(x, math.inf) if x.is_floating_point() else x - 2**40,
    "-infinity": lambda x: _edited(x, -math.inf) if x.is_floating_point() else -x,
    "huge": lambda x: _edited(x, torch.finfo(x.dtype).max) if x.is_floating_point() else x + 1,
}
HUGE = (2**62, 2**63, 10**400)
WRONG_NUMBERS: tuple[Any, ...] = (None, "1", math.nan, math.inf, -math.inf, -1, 0, 0.5, -0.5, 2, True)
WRONG_NUMBERS += (1j, b"1", [1], (), object())
WRONG_NUMBERS += (Fraction(1, 3), decimal.Decimal(1), np.array([1, 2]), np.array(1.0), np.complex64(1), np.bool_(True))
WRONG_NUMBERS += (torch.ones(2), torch.ones((), requires_grad=True), torch.ones((), device="meta"), torch.ones(()))
WRONG_NUMBERS += (np.int64(-1), np.float32(math.nan), 10**400, -(10**400), torch.tensor(1j), 1e-320, 1e308)
WRONG_OTHERS: tuple[Any, ...] = (
    None,
    "",
    "nope",
    1,
    0.5,
    [],
    (),
    ["z"],
    np.array(["a", "b"]),
    b"z",
    object(),
    dict,
    torch.ones(2),
    True,
)
WRONG_OTHERS += (("z", "z"), ("z", 1), (1.0,), (1.0, 0.0), ("a", "b"), (math.nan, 1.0), np.bool_(True), {"z": 1}, 2**62)


def wrong(draw: Draw, value: Any, costly: bool) -> tuple[str, Any]:
    """A thing that does not belong where this value does, and what to call it."""
    if isinstance(value, Tensor):
        name = draw.choice(list(WRONG_TENSORS))
        with contextlib.suppress(RuntimeError, IndexError, TypeError):
            x = WRONG_TENSORS[name](value)
            return (f"{name}: {shown(x)}" if isinstance(x, Tensor) else name), x
    if isinstance(value, int | float) and not isinstance(value, bool):
        x = draw.choice((*WRONG_NUMBERS, *(() if costly else HUGE)))
        return shown(x), x
    x = draw.choice(WRONG_OTHERS if draw.chance(0.7) else WRONG_NUMBERS)
    return shown(x), x


# What is around a call.


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default device meta": lambda: torch.device("meta"),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
}
