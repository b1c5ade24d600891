"""The package calls the libraries as their headers declare; one of another revision is refused, not called."""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.helpers import DTYPES
from support.host_simt import ROOT, needed

from fastvae.backends import c_interface, native_library

HEADERS = [ROOT / "kernels" / "include" / name for name in ("fastvae.h", "fastvae_cuda.h")]


def declarations() -> str:
    """The declarations of both headers: no comments, and whitespace all alike."""
    return " ".join(" ".join(re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S).split()) for path in HEADERS)


def test_the_interfaces_number_is_the_digest_of_its_headers() -> None:
    """Of their words too, as these say what numbers mean."""
    headers = "".join(path.read_text() for path in HEADERS)
    (defined,) = re.findall(r"#define FASTVAE_INTERFACE (\w+)", headers)
    digest = hashlib.sha256(headers.replace(f"FASTVAE_INTERFACE {defined}", "").encode()).hexdigest()
    number = int(digest[:7], 16)
    assert {int(defined, 0), c_interface.INTERFACE} == {number}, (
        f"The C interface has changed: 0x{number:X} is FASTVAE_INTERFACE in fastvae.h and INTERFACE in"
        " fastvae/backends/c_interface.py."
    )


TYPES = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "double": ctypes.c_double}  # others are pointers


def declared(pattern: str) -> dict[str, tuple[type, ...]]:
    """The types of parameters of the functions that the headers declare so, by name and in order."""
    text = declarations()
    macros = dict(re.findall(r"#define (FASTVAE_(?:WEIGHTS|CUDA_PAIRS)) \\? ?([^#]*?)(?= FASTVAE| #| typedef)", text))
    found: dict[str, tuple[type, ...]] = {}
    for name, parameters in re.findall(pattern + r"\(([^()]*)\);", text):
        for macro, meaning in macros.items():
            parameters = parameters.replace(macro, meaning)
        kinds = ["*" if "*" in x else x.replace("const ", "").split()[0] for x in parameters.split(",")]
        found[name] = tuple(TYPES.get(kind, ctypes.c_void_p) for kind in kinds)
    return found


def test_the_table_of_kernels_is_the_headers() -> None:
    kernels = declared(r"int \(\*(\w+)\)")
    assert list(c_interface.KERNELS) == list(kernels)
    assert {name: (*kinds, ctypes.c_int) for name, kinds in c_interface.KERNELS.items()} == kernels


def test_cudas_functions_are_the_headers() -> None:
    c, of_no_op = c_interface, ("interface", "simulated")
    kernels = {name: (ctypes.c_int, *kinds, ctypes.c_void_p) for name, kinds in c.CUDA_FUNCTIONS.items()}
    functions = declared(r"FASTVAE_EXPORT int fastvae_cuda_(\w+)")
    assert kernels == {name: kinds for name, kinds in functions.items() if name not in of_no_op}
    sizes = {f"{op}_workspace": (ctypes.c_int, *kinds, ctypes.c_int) for op, kinds in c.CUDA_WORKSPACES.items()}
    assert sizes == declared(r"FASTVAE_EXPORT int64_t fastvae_cuda_(\w+)")


def test_every_kernel_is_in_its_table() -> None:
    """A file of kernels adds its own to the table: none is forgotten."""
    if native_library.missing():
        pytest.skip(native_library.missing())
    for isa in native_library.instruction_sets():
        for dtype in DTYPES:
            table = native_library.kernels_for(isa, dtype)
            assert all(getattr(table, name) for name in c_interface.KERNELS), isa


def test_every_kernel_is_run_without_python() -> None:
    threads = (ROOT / "tests" / "native" / "threads.cpp").read_text()
    assert [name for name in c_interface.KERNELS if f"k.{name}(" not in threads] == []


@pytest.mark.parametrize("number", [c_interface.INTERFACE + 1, None])
@pytest.mark.parametrize(
    ("backend", "variable", "function"),
    [("native", "FASTVAE_LIBRARY", "fastvae_interface"), ("cuda", "FASTVAE_CUDA_LIBRARY", "fastvae_cuda_interface")],
)
def test_another_revision_is_refused(
    backend: str, variable: str, function: str, number: int | None, tmp_path: Path
) -> None:
    """A library of another revision is refused with a reason, before anything else of it is called. What would compute
    with it is an error, and not computed by something else."""
    source = "" if number is None else f"int {function}(void) {{ return {number}; }}"
    library = tmp_path / "library.so"
    subprocess.run([needed("cc"), "-xc", "-shared", "-fPIC", "-", "-o", library], input=source, text=True, check=True)
    code = f"""
import fastvae, torch
from fastvae.__main__ import main
main(["info"])
try:
    fastvae.use_backend("{backend}")
except RuntimeError as error:
    print(error)
print(fastvae.kl_gauss(torch.ones(1, 5), torch.zeros(1, 5)).item())
"""
    environment = {**os.environ, variable: str(library), "FASTVAE_BACKEND": ""}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    reason = f"{variable}={library}: the interface number of {library} is {number or 'none'} and that of the imported"
    rest = f" .* is {c_interface.INTERFACE},.*unset {variable}$"
    assert re.search(rf"^  {backend} +not used: {reason}{rest}", ran.stdout, re.M)
    assert f"\nbackend {backend!r} is not available: {reason} " in ran.stdout
    if backend == "native":
        assert ran.stderr.splitlines()[-1].startswith(f"fastvae.backends.settings.WrongSetting: {reason} ")
    else:  # which nobody has asked to compute
        assert ran.stdout.splitlines()[-1] == "2.5"
