"""Devices that no kernel is for: the reference computes there, eagerly and where the compiler traces."""

import subprocess
import sys

import pytest
from support.host_simt import ROOT


@pytest.mark.parametrize("mode", ["values", "fake"])
def test_a_device_of_private_use(mode: str) -> None:
    """Every op with its gradients on a device that runs on the CPU. For tracing there are fakes only: Python cannot
    give such a device what the compiler needs to run on it."""
    command = [sys.executable, str(ROOT / "tests" / "support" / "elsewhere.py"), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stdout + done.stderr[-3000:]
