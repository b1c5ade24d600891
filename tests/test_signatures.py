"""The public names and their signatures are those of a listing, tests/data/signatures.txt, so that a change of the
interface is a difference that can be read. `python tests/test_signatures.py` writes the listing anew."""

import dataclasses
import difflib
import enum
import functools
import inspect
import typing
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, UnionType
from typing import Any

import pytest

import fastvae

LISTING = Path(__file__).parent / "data" / "signatures.txt"


def shown(annotation: Any) -> str:
    """An annotation without the names of modules, alike in all versions of Python."""
    if isinstance(annotation, str):
        return annotation
    if annotation in (None, type(None)):
        return "None"
    if annotation is ...:
        return "..."
    if isinstance(annotation, list):  # the arguments of a Callable
        return f"[{', '.join(map(shown, annotation))}]"
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (UnionType, typing.Union):
        return " | ".join(map(shown, arguments))
    name = getattr(origin or annotation, "__name__", None) or getattr(origin or annotation, "_name", None)
    return f"{name or annotation}{shown(list(arguments)) if arguments else ''}"


class Text:
    """What inspect writes as it is."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def signature(function: Any, *, of_instance: bool = False, returns: bool = True) -> str:
    """The signature of a function or class, without `self` for the method of an instance."""
    given = inspect.signature(function)
    parameters = []
    for parameter in list(given.parameters.values())[1 if of_instance else 0 :]:
        if parameter.annotation is not parameter.empty:
            parameter = parameter.replace(annotation=Text(shown(parameter.annotation)))
        if isinstance(parameter.default, enum.Enum):
            parameter = parameter.replace(default=Text(parameter.default.name))
        parameters.append(parameter)
    returned = given.return_annotation
    if returned is not given.empty:
        returned = Text(shown(returned)) if returns else given.empty
    return str(given.replace(parameters=parameters, return_annotation=returned))


def of_class(name: str, cls: type) -> Iterator[str]:
    """The lines of a class: its signature, which has the fields of named tuples and dataclasses; its methods,
    properties and annotated attributes, those that it has from classes of fastvae too."""
    bases = [base for base in reversed(cls.__mro__) if base.__module__.partition(".")[0] == "fastvae"]
    if getattr(cls, "_is_protocol", False):
        yield name
    elif any(method in vars(base) for base in bases for method in ("__init__", "__new__")):
        yield name + signature(cls, returns=False)
    else:
        yield f"{name}()"
    fields = set(getattr(cls, "_fields", ()))
    if dataclasses.is_dataclass(cls):
        fields |= {field.name for field in dataclasses.fields(cls)}
    members: dict[str, str] = {}
    for base in bases:
        for member, annotation in inspect.get_annotations(base).items():
            members[member] = f": {shown(annotation)}"
        for member, value in vars(base).items():
            if isinstance(value, property | functools.cached_property):
                getter: Any = value.fget if isinstance(value, property) else value.func
                members[member] = f": {shown(inspect.signature(getter).return_annotation)}"
            elif isinstance(value, classmethod | staticmethod):
                members[member] = signature(getattr(base, member))
            elif inspect.isfunction(value):
                members[member] = signature(value, of_instance=True)
    for member, text in sorted(members.items()):
        private = member.startswith("_") and member != "__call__"
        if not private and member not in fields and member != "extra_repr":
            yield f"    .{member}{text}"


def of_module(name: str, module: ModuleType) -> Iterator[str]:
    """The lines of the functions and classes that a module offers, by its `__all__`."""
    for member in sorted(module.__all__):
        value = getattr(module, member)
        if member in fastvae.__all__:
            yield f"{name}.{member} = {member}"
        elif callable(value):
            yield from lines(f"{name}.{member}", value)


def lines(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, ModuleType):
        yield from of_module(name, value)
    elif isinstance(value, type):
        yield from of_class(name, value)
    else:
        yield name + signature(value)


def listing(*, with_plots: bool) -> list[str]:
    """All lines; `fastvae.plots` needs matplotlib."""
    names = sorted({*fastvae.__all__, *(["plots"] if with_plots else [])}, key=lambda name: (name.lower(), name))
    return [line for name in names for line in lines(name, getattr(fastvae, name))]


def has_matplotlib() -> bool:
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def test_the_interface_is_the_listed_one() -> None:
    with_plots = has_matplotlib()
    expected = [line for line in LISTING.read_text().splitlines() if with_plots or not line.startswith("plots.")]
    difference = "\n".join(difflib.unified_diff(expected, listing(with_plots=with_plots), "listed", "now", lineterm=""))
    assert not difference, (
        f"the interface differs from {LISTING.name}:\n{difference}\nIf it is meant to, write the listing anew, by"
        " `python tests/test_signatures.py`, and a line in CHANGELOG.md with what to write instead."
    )


def test_a_change_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "signatures.txt"
    other.write_text(LISTING.read_text().replace("dim: int = -1", "dim: int = 0"))
    monkeypatch.setitem(globals(), "LISTING", other)
    message = r"(?s)-entropy\(.*= 0.*\+entropy\(.*= -1.*python tests/test_signatures\.py"
    with pytest.raises(AssertionError, match=message):
        test_the_interface_is_the_listed_one()


if __name__ == "__main__":
    LISTING.write_text("\n".join(listing(with_plots=True)) + "\n")
