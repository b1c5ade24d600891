"""python -m fastvae: info, help, and command lines that are wrong."""

import re
import subprocess
import sys

import pytest
import torch

import fastvae
from fastvae import backends
from fastvae.__main__ import main
from fastvae.backends import native, native_library


def info(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    return dict(re.findall(r"^  (\S+(?: \S+)*?)  +(.+)$", output, re.M)), output


def test_info_says_what_computes(capsys):
    rows, output = info(capsys)
    assert output.startswith(f"fastvae {fastvae.__version__}\n")
    assert rows["torch"] == torch.__version__
    assert rows["threads"] == str(torch.get_num_threads())
    assert rows["CPU tensors"] == backends.backend_for(torch.device("cpu")).__name__.split(".")[-1]
    assert rows["CUDA tensors"] == backends.backend_for(torch.device("cuda")).__name__.split(".")[-1]
    for name in backends.NAMES:
        assert rows[name].startswith(("used for ", "not used: "))


def test_info_names_the_native_library_and_its_instruction_set(capsys):
    if not native.status()[0]:
        pytest.skip(native.status()[1])
    rows, _ = info(capsys)
    assert rows["native library"] == native_library.library().fastvae_version().decode()
    assert rows["instruction set"].split()[0] in native_library.instruction_sets()


def test_info_gives_the_reason_where_native_cannot_be_used(capsys, monkeypatch):
    monkeypatch.setattr(native, "status", lambda: (False, "libfastvae_cpu.so: cannot open it"))
    monkeypatch.setattr(backends, "_choose", backends._choose.__wrapped__)  # without what it remembers
    with fastvae.use_backend(None):
        rows, _ = info(capsys)
    assert rows["CPU tensors"] == "reference"
    assert rows["native"] == "not used: libfastvae_cpu.so: cannot open it"
    assert rows["native library"] == "not loaded"
    assert rows["instruction set"].startswith("none")


def test_info_survives_a_wrong_environment():
    command = [sys.executable, "-c", "from fastvae.__main__ import main; raise SystemExit(main(['info']))"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"FASTVAE_BACKEND": "nonsense", "PYTHONPATH": ":".join(sys.path)}
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"CPU tensors +none: .*'nonsense'", done.stdout)


def test_importing_fastvae_imports_nothing_heavy():
    heavy = "{'matplotlib', 'sklearn'} & set(sys.modules)"
    command = [sys.executable, "-c", f"import fastvae, sys; raise SystemExit(len({heavy}))"]
    assert subprocess.run(command, env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


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
