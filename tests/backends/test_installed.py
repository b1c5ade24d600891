"""A tree of sources that shadows an installed package: it finds the library that is installed and its own GPU kernels,
or says what is missing and what to do."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.host_simt import ROOT, needed

from fastvae.backends import c_interface, cuda, installed, native_library

BUILDS = "`FASTVAE_REQUIRE_NATIVE=1 pip install --force-reinstall --no-deps {}` builds it"
ANOTHER = f"extern int fastvae_interface(void) {{ return {c_interface.INTERFACE + 1}; }}"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files that a fresh clone has of the package and the benchmarks."""
    root = tmp_path / "tree"
    root.mkdir()
    for name in ("fastvae", "kernels", "bench", "pyproject.toml", "CMakeLists.txt"):
        (root / name).symlink_to(ROOT / name)
    return root


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder where packages are installed: with the metadata of one, and its folder, which is empty."""
    folder = tmp_path / "site"
    (folder / "fastvae").mkdir(parents=True)
    (folder / "fastvae-0.1.0.dist-info").mkdir()
    (folder / "fastvae-0.1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fastvae\nVersion: 0.1.0\n"
    )
    return folder


def run(tree: Path, site: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs code in the root of the tree, without site-packages' start-up files, which an editable installation adds
    itself by."""
    others = [path for path in sys.path if path and Path(path).resolve() not in (ROOT, ROOT / "tests")]
    path = os.pathsep.join(map(str, (tree, site, *others)))
    unset = dict.fromkeys(("FASTVAE_BACKEND", "FASTVAE_LIBRARY", "FASTVAE_CUDA_LIBRARY", "FASTVAE_CPU_ISA"), "")
    return subprocess.run(
        [sys.executable, "-S", "-c", code],
        cwd=tree,
        env={key: x for key, x in (os.environ | unset).items() if "XDIST" not in key} | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


INFO = """
import fastvae, torch
from fastvae.__main__ import main
print("exit", main(["info"]))
"""


def test_a_tree_finds_what_is_installed(tree: Path, site: Path) -> None:
    pytest.importorskip("triton")
    if native_library.missing():
        pytest.skip(native_library.missing())
    library = shutil.copy(native_library.library()._name, site / "fastvae" / native_library.LIBRARY)
    computing = """
print(fastvae.kl_gauss(torch.ones(1, 5), torch.zeros(1, 5)).item())
import fastvae.kernels.triton.kl_gauss as kernels
print(kernels.__file__)
"""
    ran = run(tree, site, INFO + computing)
    assert ran.stderr == ""
    rows = dict(line.strip().split("  ", 1) for line in ran.stdout.splitlines() if line.startswith("  "))
    assert rows["package"].strip() == str(tree / "fastvae")
    assert rows["native library"].strip().endswith(str(library))
    assert rows["CPU tensors"].strip() == "native"
    assert ran.stdout.splitlines()[-3:] == ["exit 0", "2.5", str(tree / "kernels" / "triton" / "kl_gauss.py")]


NONE_INSTALLED = """
from importlib import metadata
others = metadata.distributions
metadata.distributions = lambda **only: iter(()) if only.get("name") == "fastvae" else others(**only)
"""
# The first calls are under the compiler, which refuses warnings where it sees them.
COMPUTING_TWICE = """
compiled = torch.compile(fastvae.kl_gauss, backend="eager", fullgraph=True)
mu, logvar = torch.ones(1, 5), torch.zeros(1, 5)
with fastvae.use_backend("reference"):  # as asked: no warning
    compiled(mu, logvar)
print(compiled(mu, logvar).item(), fastvae.kl_gauss(mu, logvar).item())
"""
MEASURING = """
import pytest
raise SystemExit(pytest.main(["-q", "-p", "no:cacheprovider", "bench", "-k", "kl_gauss", "--benchmark-only"]))
"""


@pytest.mark.parametrize("what", ["none", "another interface"])
def test_a_tree_without_a_library_says_what_to_do(tree: Path, site: Path, what: str) -> None:
    """A tree without a library says what to do in `info`, and by one warning at the first call, which the reference
    computes; and no benchmark takes that for fastvae."""
    pytest.importorskip("pytest_benchmark")
    if what == "none":
        code = NONE_INSTALLED + INFO + COMPUTING_TWICE + MEASURING
        reason = f"neither in the imported package, {tree / 'fastvae'}, nor in an installed one; {BUILDS.format(tree)}"
    else:
        code = INFO + MEASURING
        library = site / "fastvae" / native_library.LIBRARY
        subprocess.run(
            [needed("cc"), "-xc", "-shared", "-fPIC", "-", "-o", library], input=ANOTHER, text=True, check=True
        )
        reason = f"the interface number of {library} is {c_interface.INTERFACE + 1} and that of the imported package,"
    ran = run(tree, site, code)
    (role,) = (line for line in ran.stdout.splitlines() if line.startswith("  native  "))
    assert f"not used: {native_library.LIBRARY}: {reason}" in role
    assert "exit 0" in ran.stdout
    warning = "UserWarning: fastvae computes on CPU tensors by its reference, which is slow, because"
    if what == "none":
        assert "\n2.5 2.5\n" in ran.stdout
        assert ran.stderr.count(warning) == 1
    else:
        assert warning not in ran.stderr  # info is no call
    assert ran.returncode == pytest.ExitCode.USAGE_ERROR
    refusal = ran.stderr[ran.stderr.index("ERROR: ") :]
    assert refusal.startswith("ERROR: fastvae is measured on its backend native, but reference would compute: ")
    assert reason in refusal


ORIGINS = {
    "an index": ({}, "--no-cache-dir --no-binary fastvae fastvae"),
    "a wheel": ({"archive_info": {}, "url": "file:///a.whl"}, "--no-cache-dir --no-binary fastvae fastvae"),
    "a folder": ({"dir_info": {}, "url": "file:///somewhere/fastvae"}, "file:///somewhere/fastvae"),
    "a repository": (
        {"vcs_info": {"vcs": "git", "commit_id": "abc"}, "url": "https://a.test/fastvae"},
        "git+https://a.test/fastvae@abc",
    ),
}


@pytest.mark.parametrize("origin", ORIGINS)
@pytest.mark.parametrize("pure", [True, False])
def test_a_wheel_without_a_library_says_what_to_do(
    pure: bool, origin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wheel without a library says why, and gives a command that builds it from where the package came from, with an
    error if that fails."""
    recorded, source = ORIGINS[origin]
    files = {"WHEEL": f"Root-Is-Purelib: {str(pure).lower()}\n", "direct_url.json": json.dumps(recorded)}

    class Wheel:
        def read_text(self, name: str) -> str | None:
            return files.get(name)

        def locate_file(self, path: str) -> Path:
            return tmp_path / path

    monkeypatch.setattr(installed, "files", lambda _: tmp_path / "fastvae")
    monkeypatch.setattr(installed, "distributions", lambda name: iter([Wheel()]))
    monkeypatch.setattr(installed, "PACKAGE", tmp_path / "fastvae")
    with pytest.raises(OSError, match="FASTVAE_REQUIRE_NATIVE=1 pip install") as error:
        native_library.library.__wrapped__()
    assert ("is the pure one, which no compiler has built" in str(error.value)) == pure
    assert ("neither in the imported package" in str(error.value)) == (not pure)
    assert f" --no-deps {source}`" in str(error.value)
    reason = cuda._why_not_built()
    assert f"--config-settings=cmake.define.FASTVAE_CUDA=ON {source}`" in reason
    assert "make cuda" not in reason


def test_files_of_the_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        def locate_file(self, path: str) -> Path:
            return tmp_path / "installed" / path

    monkeypatch.setattr(installed, "files", lambda _: tmp_path / "tree" / "fastvae")
    monkeypatch.setattr(installed, "distributions", lambda name: iter([Distribution()] if name == "fastvae" else []))
    assert installed.find("a.so") is None
    for root in ("installed", "tree"):
        file = tmp_path / root / "fastvae" / "a.so"
        file.parent.mkdir(parents=True)
        assert installed.find("a.so") != file
        file.touch()
        assert installed.find("a.so") == file
