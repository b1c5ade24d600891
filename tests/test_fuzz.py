"""Twenty seconds of generated calls, by tests/fuzz; `make fuzz` makes more."""

import os
import subprocess
import sys
from pathlib import Path

from support.ops import OPS

FUZZ = Path(__file__).parent / "fuzz"
SEED, COUNT = 0, 3000  # a number of calls, and not of seconds, so that every machine makes the same


def test_every_op_is_generated() -> None:
    surfaces = (FUZZ / "kernels.py").read_text()
    assert [name for name in OPS if f"@surface\ndef {name}(" not in surfaces] == []


def test_generated_calls() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(FUZZ), "--seed", str(SEED), "--count", str(COUNT)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
