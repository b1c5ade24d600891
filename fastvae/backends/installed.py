"""The package's files that are not Python: where the shared libraries are, and what builds them where they are
missing."""

import json
import os
import shlex
from importlib.metadata import distributions
from importlib.resources import files
from pathlib import Path

PACKAGE = Path(__file__).parents[1]  # that was imported


def find(name: str) -> Path | None:
    """A file of the package, or of an installed distribution of it.

    In the root of a checkout Python imports the tree, which has no library, even where `pip install .` has put one
    among the installed packages. The caller checks that its interface is this tree's.
    """
    beside = Path(str(files("fastvae") / name))  # an editable installation has it elsewhere than its Python
    elsewhere = (Path(str(d.locate_file("fastvae"))) / name for d in distributions(name="fastvae"))
    return next((path for path in (beside, *elsewhere) if path.is_file()), None)


def why_not(build: str) -> str:
    """The reason why there is no library, and what builds it."""
    if any("Root-Is-Purelib: true" in (d.read_text("WHEEL") or "") for d in distributions(name="fastvae")):
        return (
            f"the installed package is the pure one, which no compiler has built; `{build}`, with g++ 11, Clang 14 or a"
            " later one, builds it or says why not"
        )
    return f"neither in the imported package, {PACKAGE}, nor in an installed one; `{build}` builds it"


def build_command(option: str = "", in_a_checkout: str = "") -> str:
    """The command that builds the package's libraries and installs it anew, and fails where nothing compiles them.

    Args:
        option: of scikit-build-core, for example "cmake.define.FASTVAE_CUDA=ON".
        in_a_checkout: another command, where the package is one.
    """
    checkout = (PACKAGE.parent / "CMakeLists.txt").is_file()
    if checkout and in_a_checkout:
        return in_a_checkout
    command = ["FASTVAE_REQUIRE_NATIVE=1"] if os.name == "posix" else []
    command += ["pip install", "--force-reinstall", "--no-deps"]
    if option:
        command.append(f"--config-settings={option}")
    return " ".join([*command, shlex.quote(str(PACKAGE.parent)) if checkout else _origin()])


def _origin() -> str:
    """The source that pip was told to install: a folder, a repository, or the name, without the wheels of it."""
    for distribution in distributions(name="fastvae"):
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if "dir_info" in origin:
            return origin["url"]
        if "vcs_info" in origin:
            return f"{origin['vcs_info']['vcs']}+{origin['url']}@{origin['vcs_info']['commit_id']}"
    return "--no-cache-dir --no-binary fastvae fastvae"
