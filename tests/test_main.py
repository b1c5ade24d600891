"""python -m fastvae: info, help, and command lines that are wrong."""

import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastvae
from fastvae import backends
from fastvae.__main__ import main
from fastvae.backends import cuda, native, native_library, settings, triton


def info(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    return dict(re.findall(r"^  (\S+(?: \S+)*?)  +(.+)$", output, re.M)), output


def test_info_says_what_computes(capsys):
    rows, output = info(capsys)
    assert output.startswith(f"fastvae {fastvae.__version__}\n")
    assert rows["package"] == str(Path(fastvae.__file__).parent)
    assert rows["torch"] == torch.__version__
    assert rows["threads"] == str(torch.get_num_threads())
    assert rows["CPU tensors"] == backends.name_for(torch.device("cpu"))
    assert rows["CUDA tensors"] == backends.name_for(torch.device("cuda"))
    for name in backends.NAMES:
        assert rows[name].startswith(("used for ", "not used: "))


def test_info_names_the_native_library_and_its_instruction_set(capsys):
    if not native.status()[0]:
        pytest.skip(native.status()[1])
    rows, _ = info(capsys)
    assert rows["native library"].split(", ")[0] == native_library.library().fastvae_version().decode()
    assert rows["instruction set"].split()[0] in native_library.instruction_sets()


def test_info_gives_the_reason_where_native_cannot_be_used(capsys, monkeypatch):
    monkeypatch.setattr(native, "status", lambda: (False, "libfastvae_cpu.so: cannot open it"))
    monkeypatch.setattr(backends, "_choose", backends._choose.__wrapped__)  # without what it remembers
    with fastvae.use_backend(None):
        rows, _ = info(capsys)
    assert rows["CPU tensors"] == "reference"
    assert rows["native"] == "not used: libfastvae_cpu.so: cannot open it"
    assert rows["native library"] == "not loaded"
    assert rows["instruction set"] == "none"


@pytest.mark.parametrize(
    "wrong",
    [
        "FASTVAE_BACKEND=nonsense",
        "FASTVAE_BACKEND=triton",  # there is no GPU, or at least no CPU that it computes on
        "FASTVAE_LIBRARY=/dev/null",
        "FASTVAE_CUDA_LIBRARY=/dev/null",
        "FASTVAE_CPU_ISA=mmx",
        "FASTVAE_EXACT_SKIP=yes",
        "FASTVAE_CALLS=yes",
    ],
)
def test_info_says_which_variable_is_wrong(wrong, monkeypatch, capsys):
    """A wrong variable is named, and `info` ends with 1; what a process has found out once is forgotten for it."""
    name, value = wrong.split("=")
    for variable in ("FASTVAE_BACKEND", "FASTVAE_LIBRARY", "FASTVAE_CUDA_LIBRARY", "FASTVAE_CPU_ISA"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, value)
    forced = value if name == "FASTVAE_BACKEND" else None
    monkeypatch.setattr(settings, "current", settings.current._replace(backend=forced))
    monkeypatch.setattr(backends, "_choose", backends._choose.__wrapped__)
    monkeypatch.setattr(native_library, "_instruction_set", None)
    for remembered in (native_library, cuda):
        monkeypatch.setattr(remembered, "library", remembered.library.__wrapped__)
    monkeypatch.setattr(native_library, "missing", native_library.missing.__wrapped__)
    monkeypatch.setattr(cuda, "simulated", cuda.simulated.__wrapped__)
    for backend in (native, triton, cuda):
        monkeypatch.setattr(backend, "status", backend.status.__wrapped__)
    monkeypatch.setattr(triton, "_interpreting", lambda: False)
    assert main(["info"]) == 1
    output = capsys.readouterr().out
    assert re.search(rf"^Wrong environment variables\n  {wrong}: ", output, re.M)
    assert "Traceback" not in output


def test_info_says_in_a_row_what_fails_in_it(capsys, monkeypatch):
    """A broken driver or installation may fail in any way."""

    def broken(*_):
        raise OSError("the driver is\nbroken")

    monkeypatch.setattr(torch.cuda, "is_available", broken)
    monkeypatch.setattr(backends, "name_for", broken)
    rows, _ = info(capsys)
    assert rows["CUDA"] == rows["CPU tensors"] == "none: OSError: the driver is broken"


def test_importing_fastvae_imports_nothing_heavy():
    heavy = "{'matplotlib', 'sklearn'} & set(sys.modules)"
    command = [sys.executable, "-c", f"import fastvae, sys; raise SystemExit(len({heavy}))"]
    assert subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


INFO = [sys.executable, "-m", "fastvae", "info"]


def test_info_to_a_reader_that_leaves():
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody:
        ran = subprocess.run(INFO, stdout=nobody, stderr=subprocess.PIPE, text=True)
    assert (ran.returncode, ran.stderr) == (1, "")


def test_info_to_no_output_at_all():
    ran = subprocess.run(["sh", "-c", f"{shlex.join(INFO)} >&-"], stderr=subprocess.PIPE, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


def test_version(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["--version"])
    assert (leaving.value.code, capsys.readouterr().out) == (0, f"fastvae {fastvae.__version__}\n")
    assert importlib.metadata.version("fastvae") == fastvae.__version__


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    output = capsys.readouterr().out
    assert "demo" in output
    assert "info" in output


@pytest.mark.parametrize("arguments", [["demo", "-h"], ["info", "-h"], ["-h"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 0
    assert "usage: python -m fastvae" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nonsense"], "nonsense"),
        (["demo", "--epochs", "0"], "--epochs"),
        (["demo", "--epochs", "many"], "--epochs"),
        (["demo", "--seed", "x"], "--seed"),
        (["demo", "--seed", str(2**64)], "--seed"),
        (["demo", "--seed", str(-(2**63) - 1)], "--seed"),
        (["demo", "--seconds", "-1"], "--seconds"),
        (["demo", "--seconds", "nan"], "--seconds"),
        (["info", "--fast"], "--fast"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_the_usage(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert "usage: python -m fastvae" in error
    assert complaint in error


def test_a_folder_that_cannot_be_is_said_before_the_demo_trains(capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    assert main(["demo", "--out", __file__]) == 1
    assert capsys.readouterr().err == f"--out: expected a folder, or a place for one, got {__file__}: File exists\n"
