"""Where the package's files are that are not Python: the shared libraries, and how they are built where they are
missing."""

import json
from importlib.metadata import Distribution, distributions
from importlib.resources import files
from pathlib import Path

PACKAGE = Path(__file__).parents[1]  # that was imported


def find(name: str) -> Path | None:
    """A file of the package, or of an installed distribution of it.

    In the root of a checkout Python imports the tree, which has no library, even where `pip install .` has put one
    among the installed packages. Whether what is found is of this tree's interface is for the caller to see.
    """
    beside = Path(str(files("fastvae") / name))  # an editable installation has it elsewhere than its Python
    elsewhere = (Path(str(d.locate_file("fastvae"))) / name for d in _distributions())
    return next((path for path in (beside, *elsewhere) if path.is_file()), None)


def why_not(build: str) -> str:
    """Why there is no library, and what builds it."""
    if any("Root-Is-Purelib: true" in (d.read_text("WHEEL") or "") for d in _distributions()):
        return (
            f"the installed package is the pure one, which no compiler has built; `{build}`, with g++ 11, Clang 14 or a"
            " later one, builds it or says why not"
        )
    return f"neither in the imported package, {PACKAGE}, nor in an installed one; `{build}` builds it"


def build_command(*options: str, in_a_checkout: str = "") -> str:
    """What builds the libraries of this package and installs it anew, without a way out where a compiler is missing.

    Args:
        options: of scikit-build-core, for example "cmake.define.FASTVAE_CUDA=ON".
        in_a_checkout: another command, where the package is one.
    """
    install = " ".join(["FASTVAE_REQUIRE_NATIVE=1 pip install", *(f"-C{option}" for option in options)])
    if (PACKAGE.parent / "CMakeLists.txt").is_file():
        return in_a_checkout or f"{install} ."
    # A wheel that pip has built before it would take from its cache.
    source = next(filter(None, map(_folder, _distributions())), "--no-cache-dir --no-binary fastvae fastvae")
    return f"{install} --force-reinstall --no-deps {source}"


def _distributions() -> list[Distribution]:
    return list(distributions(name="fastvae"))


def _folder(distribution: Distribution) -> str:
    """That it was installed from; empty where it was no folder."""
    origin = json.loads(distribution.read_text("direct_url.json") or "{}")
    return origin["url"] if "dir_info" in origin else ""
