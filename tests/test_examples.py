"""The examples run, and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_train_loop():
    done = subprocess.run(
        [sys.executable, EXAMPLES / "train_loop.py"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    losses = [float(nell) + float(kl) for nell, kl in re.findall(r"Nell +(\S+) +KL +(\S+)", done.stdout)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 10
    assert "the two KL lines differ by" in done.stdout
