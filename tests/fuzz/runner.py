"""The child: makes the call of one seed after the other, and looks at all that came of it."""

import contextlib
import itertools
import json
import os
import random
import re
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import bounds  # noqa: F401  the surfaces
import densities  # noqa: F401
import models  # noqa: F401
import numpy as np
import torch
from calls import SURFACES, Call, Draw
from support.helpers import Expected, cast, evaluate, largest
from support.helpers import draw as fixed
from torch import Tensor
from variations import SURROUNDINGS, disguised, formed, wrong

import kernels  # noqa: F401
from fastvae.backends import settings

# RuntimeErrors
DOCUMENTED = ("fit: expected", "is not available", "was asked for")
LONG = 10.0  # seconds of the CPU's for a call of moderate sizes
SLOW_BACKEND = os.environ.get("FASTVAE_BACKEND") in ("triton", "cuda")


HERE = Path(__file__).parent


class Failure(Exception):
    """A failure: what went wrong, in a word or two, and the details."""


def run(first: int) -> None:
    for seed in itertools.count(first):
        failures: list[dict[str, str]] = []
        try:
            one(seed)
        except Failure as failure:
            what, at, detail = failure.args
            failures.append({"what": what, "at": at, "detail": detail})
        print(json.dumps({"done": failures}), flush=True)


def one(seed: int) -> None:
    draw = Draw(seed)
    torch.manual_seed(seed)
    name = draw.choice(list(SURFACES))
    call = SURFACES[name](draw)
    bad = draw.choice(list(call.arguments)) if draw.chance(0.4) else None
    around = "" if draw.chance(0.6) else draw.choice(list(SURROUNDINGS))
    if call.own_device and around == "default device meta":
        around = ""
    passed, words = {}, []
    for key, value in call.arguments.items():
        how, passed[key] = (
            wrong(draw, value, key in call.costly) if key == bad else disguised(draw, value, key in call.either)
        )
        words.append(f"{key}={'BAD ' if key == bad else ''}{how}")
    wanting = [] if bad or around in ("no_grad", "inference_mode") else differentiable(draw, call, passed)
    for key in wanting:
        passed[key].requires_grad_()
    words += [f"gradients of {', '.join(wanting)}"] if wanting else []
    text = f"{name}({', '.join(words)}){' under ' + around if around else ''}"
    print(json.dumps({"seed": seed, "surface": name, "call": text}), flush=True)

    before, settings = {key: frozen(value) for key, value in passed.items()}, state(call.draws or bad is not None)
    start, results, result = time.process_time(), [], None
    with watched(call, passed, bad):
        with SURROUNDINGS[around]():
            result = call.function(**passed)
        results = call.tensors(result) if bad is None else []
        results += gradients(draw, results, [passed[key] for key in wanting])
    if time.process_time() - start > LONG and not SLOW_BACKEND:
        raise Failure("long", bad or "", f"took {time.process_time() - start:.1f} s")
    for key, value in passed.items():
        if frozen(value) != before[key]:
            raise Failure("changed", key, f"{key} is not what it was before the call")
    if state(call.draws or bad is not None) != settings:
        raise Failure("state", "", f"settings were {settings} and are {state(call.draws or bad is not None)}")
    if bad is None and result is not None:
        right(call, result, [x.detach() for x in results], wanting)


def differentiable(draw: Draw, call: Call, passed: dict[str, Any]) -> list[str]:
    """Some of the tensors that may want gradients."""
    if not call.differentiable or call.formula is None:
        return []
    names = [key for key, x in call.arguments.items() if isinstance(x, Tensor) and x.is_floating_point()]
    chosen = [name for name in names if draw.chance(0.6)] if draw.chance(0.8) else []
    for name in chosen:
        passed[name] = passed[name].detach()
    return chosen


def upstream(output: Tensor) -> Tensor:
    return fixed(*output.shape, seed=1).to(output)


def gradients(draw: Draw, outputs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """The gradients of the leaves, under gradients of the outputs that come in any form."""
    if not leaves:
        return []
    outputs = [o for o in outputs if o.requires_grad]  # the others owe the leaves nothing
    given = [formed(draw, upstream(o))[1] for o in outputs]
    return list(torch.autograd.grad(outputs, leaves, given, materialize_grads=True))


@contextlib.contextmanager
def watched(call: Call, passed: dict[str, Any], bad: str | None) -> Iterator[None]:
    """Errors are of the documented kinds and name an argument; a good call has none; no warnings of inner troubles."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except Exception as error:
            at = f"{bad or ''} {type(error).__name__}"
            inner = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{type(error).__name__} at {Path(inner.filename).name}:{inner.lineno}: {str(error)[:300]}"
            names = "|".join(map(re.escape, call.arguments))
            if bad is None:
                raise Failure("good call refused", at, where) from error
            text = str(error)
            documented = isinstance(error, TypeError | ValueError) or (
                type(error) is RuntimeError and any(words in text for words in DOCUMENTED)
            )
            if Path(inner.filename).parent == HERE:
                return  # of a module or function that the caller gave
            if "can't allocate memory" in text and bad and endless(passed[bad]):
                return
            if bad and "returned nan values" in text:
                return  # by anomaly detection, after what overflowed as it was asked to
            if not documented:
                raise Failure("kind of error", at, where) from error
            if not re.search(rf"\b({names})\b", text) and not re.match(r"[a-z_][\w., ']*: \w", text):
                raise Failure("error without a name", at, where) from error
    for warning in caught:
        if issubclass(warning.category, RuntimeWarning | DeprecationWarning | FutureWarning):
            raise Failure("warning", warning.category.__name__, str(warning.message)[:300])


def endless(x: Any) -> bool:
    """Empty rows, too many for a result that has a number for each."""
    return isinstance(x, Tensor) and not x.is_nested and x.ndim > 0 and x.shape[0] >= 2**40


def right(call: Call, result: Any, results: list[Tensor], wanting: list[str]) -> None:
    """The values are those of the formula, and gradients too."""
    if call.check is not None:
        try:
            call.check(result, call.arguments)
        except AssertionError as error:
            raise Failure("wrong value", "", str(error)) from error
    if call.formula is None:
        return
    tensors = {k: x for k, x in call.arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}
    others = {key: value for key, value in call.arguments.items() if key not in tensors}
    inputs = {key: x.detach().clone().requires_grad_(key in wanting) for key, x in tensors.items()}

    def formula(**given: Tensor) -> list[Tensor]:
        wide = next(iter(given.values()), torch.zeros(0)).dtype
        nothing = sum(((0 * x).sum() for x in given.values() if x.requires_grad), torch.zeros((), dtype=wide))
        return [x + nothing if x.dtype == wide else x for x in call.formula(**given, **others)]  # type: ignore[misc]

    extreme = any(not (x.isfinite() & (x.abs() < 290)).all() for x in tensors.values())
    try:
        if not inputs:
            (exact,) = formula()
            Expected(lambda x: x, {"x": exact}).check(results)
        elif extreme:
            finite_as_formula(formula, inputs, results)
        else:
            expected = Expected(formula, inputs, call.centred, upstream, margin=4.0, draws=4)
            outputs = expected.exact[: len(results) - len(wanting)]
            scales = [max(1.0, largest(x)) for x in outputs] + [1.0] * len(wanting)
            if call.differences:
                scales[: len(outputs)] = [max(scales)] * len(outputs)
            for n, scale in enumerate(scales):
                expected.tolerance[n] = expected.tolerance[n] + call.slack + call.roundings * expected.eps * scale
            expected.check(results)
    except AssertionError as error:
        kind = next(
            (f"d {wanting[-n]}" for n in range(1, len(wanting) + 1) if f"result {len(results) - n} " in str(error)), ""
        )
        raise Failure("wrong value", kind, str(error)[:300]) from error


def finite_as_formula(formula: Any, inputs: dict[str, Tensor], results: list[Tensor]) -> None:
    """Results are finite where the formula is in the same dtype, however large the arguments, and NaN nowhere else."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in inputs.values()) else torch.float32
    exact = evaluate(formula, cast(inputs, torch.float64), upstream)
    plain = evaluate(formula, cast(inputs, dtype), upstream)
    for n, (got, wanted, near) in enumerate(zip(results, exact, plain, strict=True)):
        assert not (got.isnan() & ~near.isnan()).any(), f"result {n} is NaN where its formula is not"
        finite = near.isfinite() & wanted.to(got.dtype).isfinite()
        assert got[finite].isfinite().all(), f"result {n} is not finite where its formula is"


# What a call must leave alone.


def frozen(value: Any) -> Any:
    """The state of an argument, as far as it can be told now, to be compared later."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested:
        bits = None
        if value.device.type == "cpu" and not value.is_quantized and value.numel() < 10**7:
            plain = value.detach().resolve_neg().resolve_conj().clone(memory_format=torch.contiguous_format)
            bits = plain.flatten().view(torch.uint8).numpy().tobytes()
        return value.shape, value.stride(), value.storage_offset(), value.requires_grad, bits
    if isinstance(value, np.ndarray):
        return value.tobytes()
    return repr(value) if isinstance(value, int | float | str | tuple | list | None) else id(value)


def state(draws: bool) -> dict[str, Any]:
    """The settings of the process that are the caller's."""
    generators = {} if draws else {"torch": hash(bytes(torch.get_rng_state().numpy()))}
    return {
        **generators,
        "numpy": hash(np.random.get_state(legacy=False)["state"]["key"].tobytes()),
        "random": hash(random.getstate()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_anomaly_enabled()),
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "switches": settings.current,
        "filters": len(warnings.filters),
    }
