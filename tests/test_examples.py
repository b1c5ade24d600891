"""The examples run, and print what they promise."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def printed_by(example: str) -> str:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / example],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_train_loop():
    printed = printed_by("train_loop.py")
    losses = [float(nell) + float(kl) for nell, kl in re.findall(r"Nell +(\S+) +KL +(\S+)", printed)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 10
    assert "the two KL lines differ by" in printed


def test_estimator_bias_prints_the_readmes_table():
    """But for the last digit, which other compilers may round otherwise."""

    def cells(text: str) -> dict[str, list[float]]:
        rows = re.findall(r"^\| (all 10,000 posteriors|`\w+`|wrong: .*?) \| (-?\d.*) \|$", text, re.MULTILINE)
        return {name: [float(x) for x in numbers.split(" | ")] for name, numbers in rows}

    table, readme = cells(printed_by("estimator_bias.py")), cells((ROOT / "README.md").read_text())
    assert list(table) == list(readme)
    assert len(table) == 8
    for name, numbers in table.items():
        assert numbers == pytest.approx(readme[name], abs=0.011)
        assert len(numbers) == 6
    assert table["`uniform`"][1] < math.log(64) < table["`loo`"][1]
