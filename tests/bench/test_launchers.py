"""What launches on a GPU take of the host's time is measured where there is none."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def test_every_row_has_the_times_of_all() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "bench.cpu.launchers", "--rounds", "1"],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    head, _, *rows = ran.stdout.splitlines()
    assert head == "| us | triton | triton, not replayed | cuda | target |"
    times = {row.split("|")[1].strip(): re.findall(r"\| (\d+) (?=\|)", row) for row in rows}
    assert all(len(found) >= 3 for found in times.values()), ran.stdout
    assert {"kl_gauss", "agg_log_prob_marginals_backward", "kl_decomposition, own weights"} <= set(times)
