"""Generated calls of everything public, good and bad, in child processes.

    python tests/fuzz --seconds 60 --seed 0      or  make fuzz SECONDS=60 SEED=0
    python tests/fuzz --count 1 --seed 123       that call again

Each seed is a call. A failure is a crash, a hang, an error of another kind than the documented ones or one that names
no argument, a value or a gradient that is not that of the formula in float64, NaN from finite arguments, and arguments
or settings of the process that a call has changed. The backend is the best one; FASTVAE_BACKEND names another.
"""

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
PATIENCE = 60.0  # seconds for a call, on a machine that has other things to do


def child(first: int) -> subprocess.Popen[str]:
    """A process that makes the calls of all seeds from `first` on, and says what it does, a line of JSON at a time."""
    command = [sys.executable, "-X", "faulthandler", str(HERE), "--child", str(first)]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def lines_of(stream: IO[str]) -> "queue.SimpleQueue[str | None]":
    """The stream's lines as they come, and None at its end."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        for line in stream:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def failures(first: int, count: int, seconds: float) -> tuple[list[dict[str, Any]], int]:
    """The failures, with what went wrong, and the number of calls."""
    found: list[dict[str, Any]] = []
    end, seed, last = time.monotonic() + seconds, first, first + count
    while seed < last and time.monotonic() < end:
        process = child(seed)
        assert process.stdout is not None
        assert process.stderr is not None
        lines, errors = lines_of(process.stdout), lines_of(process.stderr)
        call: dict[str, Any] = {"seed": seed, "surface": "start", "call": ""}
        while seed < last and time.monotonic() < end:
            try:
                line = lines.get(timeout=PATIENCE)
            except queue.Empty:
                found.append({**call, "what": "hang", "detail": f"no end after {PATIENCE:.0f} s"})
                break
            if line is None:
                tail = [text for text in iter(errors.get, None) if text.strip()]
                where = "".join(tail[-25:]).strip()
                found.append({**call, "what": "crash", "detail": f"exit status {process.wait()}\n{where}"})
                break
            message = json.loads(line)
            if "done" in message:
                found += [{**call, **failure} for failure in message["done"]]
                seed += 1
            else:
                call = message
        else:
            process.kill()
            process.wait()
            break
        process.kill()
        process.wait()
        seed += 1  # past the one that ended it
    return found, seed - first


def report(found: list[dict[str, Any]], n_calls: int) -> str:
    """The first failure of each kind, and how many there are."""
    kinds = Counter((f["surface"], f["what"], f.get("at", "")) for f in found)
    text = [f"{n_calls} calls, {len(found)} failures of {len(kinds)} kinds"]
    for kind, n in kinds.most_common():
        f = next(f for f in found if (f["surface"], f["what"], f.get("at", "")) == kind)
        text.append(f"\n{f['what']} ({n} times)  make fuzz SEED={f['seed']} COUNT=1\n  {f['call']}\n  {f['detail']}")
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/fuzz", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="how long")
    parser.add_argument("--count", type=int, default=2**62, help="how many calls")
    parser.add_argument("--seed", type=int, default=0, help="of the first call; each has the next")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        sys.path.insert(0, str(HERE.parent))
        import conftest  # noqa: F401  first: it says where kernels for GPUs run
        import runner

        runner.run(arguments.child)
        return 0
    found, n_calls = failures(arguments.seed, arguments.count, arguments.seconds)
    print(report(found, n_calls))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
