"""Compares this working tree with another revision, call by call: faster, slower, or within the noise.

    python -m bench.cpu.compare BASE              BASE: any name of a commit
    python -m bench.cpu.compare BASE --count      instructions of small calls instead of times, which no noise moves

Both native libraries are built side by side in build/compare, and each revision runs in a process of its own, the base
in two, so that base against base shows what a difference of nothing looks like here and now. The three take turns.
Instructions are counted by valgrind's callgrind, on one thread and with the instruction set that valgrind knows.
"""

import argparse
import contextlib
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..harness import race
from .calls import CALLS, SMALL
from .results import table, time_text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FOLDER = ROOT / "build" / "compare"

ROUNDS = 25
TURN = 0.02  # seconds that one takes before it is another's turn
COUNTED = 50  # runs


class Difference(NamedTuple):
    """ratio: the time of the new over that of the base. noise: how far from 1 it may be where nothing differs."""

    base: float
    new: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.new / self.base

    @property
    def verdict(self) -> str:
        distance = math.log(self.ratio)
        return "within noise" if abs(distance) <= self.noise else "slower" if distance > 0 else "faster"


def difference(base: Sequence[float], again: Sequence[float], new: Sequence[float]) -> Difference:
    """Judges the times of rounds, the base's measured twice. The noise is what base against base differs by, and three
    standard errors of a median over rounds, from the median deviation of all three."""
    null = [math.log(b / a) for a, b in zip(base, again, strict=True)]
    shift = statistics.median(null)
    changed = [math.log(n / math.sqrt(a * b)) for a, b, n in zip(base, again, new, strict=True)]
    middle = statistics.median(changed)
    spread = max(statistics.median(abs(x - shift) for x in null), statistics.median(abs(x - middle) for x in changed))
    error = 1.4826 * spread * math.sqrt(math.pi / 2 / len(null))  # of a normal distribution's median
    before = statistics.median(math.sqrt(a * b) for a, b in zip(base, again, strict=True))
    return Difference(before, before * math.exp(middle), abs(shift) + 3 * error)


class Revision(NamedTuple):
    tree: Path
    library: Path

    def environment(self, **more: str) -> dict[str, str]:
        packages = sysconfig.get_paths()["purelib"]
        own = {"PYTHONPATH": f"{self.tree}{os.pathsep}{packages}", "FASTVAE_LIBRARY": str(self.library)}
        return os.environ | own | more


def built(tree: Path, name: str, flags: str = "") -> Revision:
    """A tree with its native library, as it is released unless flags for the compiler are given."""
    folder = FOLDER / f"{name}-library"
    ninja = Path(sys.executable).parent / "ninja"
    cmake = str(ninja.with_name("cmake"))
    kind = "Flags" if flags else "Release"
    options = [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_BUILD_TYPE={kind}", f"-DCMAKE_CXX_FLAGS_FLAGS={flags}"]
    for step in (["-S", tree, "-B", folder, "-G", "Ninja", *options], ["--build", folder]):
        subprocess.run([cmake, *map(str, step)], check=True, stdout=sys.stderr)
    (library,) = folder.glob("libfastvae_cpu.*")
    return Revision(tree, library)


@contextlib.contextmanager
def checked_out(revision: str) -> Iterator[tuple[Path, str]]:
    """A commit in a folder of its own while it lasts, and the commit's short name."""
    command = ["git", "-C", str(ROOT)]
    found = subprocess.run(
        [*command, "rev-parse", "--short", "--verify", f"{revision}^{{commit}}"], capture_output=True, text=True
    )
    if found.returncode:
        raise SystemExit(f"BASE: expected a commit, got {revision!r}")
    commit = found.stdout.strip()
    tree = FOLDER / commit
    subprocess.run([*command, "worktree", "prune"], check=True)
    if not tree.exists():
        subprocess.run([*command, "worktree", "add", "--quiet", "--detach", str(tree), commit], check=True)
    try:
        yield tree, commit
    finally:
        subprocess.run([*command, "worktree", "remove", "--force", str(tree)], check=True)


class Worker:
    """A process that runs calls with a revision. Without site-packages' own start-up files, an editable installation
    would be found before the revision."""

    def __init__(self, revision: Revision, *before: str, **environment: str):
        self.process = subprocess.Popen(
            [*before, sys.executable, "-S", str(HERE / "calls.py")],
            env=revision.environment(**environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, call: str, count: int) -> list[float]:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([call, count]) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{call}: the process ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def compare(base: Revision, new: Revision, calls: Sequence[str]) -> dict[str, Difference]:
    found = {}
    with contextlib.ExitStack() as stack:
        workers = [Worker(revision) for revision in (base, base, new)]
        for worker in workers:
            stack.callback(worker.close)
        for call in calls:
            count = max(1, int(TURN / max(min(worker.run(call, 5)) for worker in workers)))

            def once(worker: Worker, _: int, call: str = call, count: int = count) -> float:
                return statistics.median(worker.run(call, count + 1)[1:])

            times = race(dict.fromkeys(workers, ROUNDS), once)
            found[call] = difference(*times.values())
    return found


def instructions(revision: Revision, calls: Sequence[str]) -> dict[str, float]:
    """The instructions of one run of each call, Python's and torch's included."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        valgrind = f"valgrind -q --tool=callgrind --instr-atstart=no --callgrind-out-file={out}".split()
        worker = Worker(revision, *valgrind, OMP_NUM_THREADS="1", PYTHONHASHSEED="0")

        def control(*options: str) -> None:
            subprocess.run(["callgrind_control", *options, str(worker.process.pid)], check=True, capture_output=True)

        for n, call in enumerate(calls, 1):
            worker.run(call, 5)
            control("--instr=on")
            worker.run(call, COUNTED)
            control("--instr=off")
            control("--dump")
            (total,) = re.findall(r"^(?:totals|summary): (\d+)$", Path(f"{out}.{n}").read_text(), re.MULTILINE)[-1:]
            found[call] = int(total) / COUNTED
        worker.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="the revision to compare with")
    parser.add_argument("--count", action="store_true", help="count instructions of small calls, with valgrind")
    parser.add_argument("--only", default="", help="calls whose name has this in it")
    parser.add_argument(
        "--flags", default="", help="for the compiler of the working tree's library, not those of a release"
    )
    options = parser.parse_args()
    if options.count and not shutil.which("valgrind"):
        raise SystemExit("--count: expected valgrind to be installed")
    calls = [call for call in (map(str, SMALL) if options.count else CALLS) if options.only in call]
    with checked_out(options.base) as (tree, commit):
        base, new = built(tree, commit), built(ROOT, "new", options.flags)
        if options.count:
            counts = [instructions(revision, calls) for revision in (base, new)]
            rows = [
                (call, *(f"{c[call]:,.0f}" for c in counts), f"{counts[1][call] / counts[0][call]:.4f}")
                for call in calls
            ]
            print("\n".join(table(("instructions of", commit, "working tree", "ratio"), rows)))
        else:
            found = compare(base, new, calls)
            rows = [
                (call, time_text(d.base), time_text(d.new), f"{d.ratio:.3f}", f"± {d.noise:.3f}", d.verdict)
                for call, d in found.items()
            ]
            print("\n".join(table(("call", commit, "working tree", "ratio", "noise", ""), rows)))


if __name__ == "__main__":
    main()
