"""Profiles the main kernels of a backend by Nsight Compute: `python -m bench.gpu.profile BACKEND OUT`.

Runs ncu on this module with --inside, which calls every op once, warmed up, between the start and the stop of the
profiler; keeps ncu's raw page, OUT/ncu-BACKEND.csv, and reads one line for each kernel from it.
"""

import argparse
import csv
import re
import subprocess
import sys
from pathlib import Path

KERNELS = {
    "triton": (
        *("_kl_gauss", "_kl_gauss_backward", "_sample_gauss", "_sample_gauss_backward", "joint_rows"),
        *("_joint_columns", "_joint_and_marginals", "_marginal_rows", "_marginal_columns"),
    ),
    "cuda": (
        *("kl_of_block", "kl_backward", "sample_rows", "sample_backward", "joint_sums", "pull_on_rows"),
        *("pull_on_columns", "marginal_sums", "pull_on_marginal_columns"),
    ),
}
METRICS = {  # what is printed: the names that versions of ncu have for it
    "time": ("gpu__time_duration.sum",),
    "issue": (
        "sm__inst_issued.avg.pct_of_peak_sustained_active",
        "sm__instruction_throughput.avg.pct_of_peak_sustained_active",
    ),
    "FMA": (
        "sm__pipe_fma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active",
    ),
    "XU": ("sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active",),
    "L1": ("l1tex__throughput.avg.pct_of_peak_sustained_active", "l1tex__throughput.avg.pct_of_peak_sustained_elapsed"),
    "DRAM": (
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "warps": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
    "registers": ("launch__registers_per_thread",),
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(?!selected_per)(\w+)_per_issue_active\.ratio")


def lines(path: Path, backend: str) -> dict[str, str]:
    """A line for each of the backend's kernels, of its first launch, in the order of the launches."""
    text = path.read_text().splitlines()
    begin = next((n for n, said in enumerate(text) if said.startswith('"ID"')), len(text))  # after ncu's messages
    rows = list(csv.DictReader(text[begin:]))[1:]  # the first holds units
    kernel = re.compile(rf"\b({'|'.join(KERNELS[backend])})\b")
    found: dict[str, str] = {}
    for row in rows:
        if name := kernel.search(row["Kernel Name"]):
            found.setdefault(name[0], line(name[0], row))
    return found


def line(name: str, row: dict[str, str]) -> str:
    parts = []
    for what, names in METRICS.items():
        metric = next((m for m in names if row.get(m)), None)
        value = number(row[metric]) if metric else None
        if value is None:
            parts.append(f"{what} -")
        elif what == "time":
            parts.append(f"{value / 1e3:.1f} us")
        else:
            parts.append(f"{what} {value:.0f}" + ("" if what == "registers" else "%"))
    stalls = {m[1]: value for key, text in row.items() if (m := STALL.fullmatch(key)) and (value := number(text))}
    worst = sorted(stalls, key=lambda reason: -stalls[reason])[:3]
    return f"{name}: {', '.join(parts)}; stalls: {', '.join(f'{r} {stalls[r]:.2f}' for r in worst) or '-'}"


def number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def inside(backend: str) -> None:
    """Runs the program that is profiled."""
    import torch

    from ..cases import BOTH, Case
    from .contests import Contest
    from .harness import TRIAL

    cases = [Case(op, (1 << 18, 128), BOTH) for op in ("kl_gauss", "sample_gauss")]
    cases += [Case("agg_log_prob", (8192, 64), BOTH), Case("agg_log_prob_marginals", (8192, 32), BOTH)]
    contests = [Contest(case, backends=[backend]) for case in cases]
    runs = [run for contest in contests for run in contest.runs(contest.inputs()).values()]
    for run in runs:
        run(), run()
    torch.cuda.synchronize()
    if not TRIAL:
        torch.cuda.profiler.start()
    for run in runs:
        run()
    torch.cuda.synchronize()
    if not TRIAL:
        torch.cuda.profiler.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=KERNELS)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--inside", action="store_true")
    options = parser.parse_args()
    if options.inside:
        return inside(options.backend)
    path = options.out / f"ncu-{options.backend}.csv"
    names = "|".join(KERNELS[options.backend])
    ncu = ["ncu", "--clock-control", "none", "--set", "full", "--profile-from-start", "off", "--csv", "--page", "raw"]
    ncu += [
        "--kernel-name",
        f"regex:({names})",
        "--launch-count",
        "24",
        "--print-units",
        "base",
        "--log-file",
        str(path),
    ]
    try:
        subprocess.run([*ncu, sys.executable, "-m", "bench.gpu.profile", options.backend, "--inside"], check=True)
    except FileNotFoundError:
        sys.exit("ncu is missing")
    except subprocess.CalledProcessError as error:
        text = path.read_text() if path.exists() else ""
        first = next((said for said in text.splitlines() if said.startswith("==ERROR==")), text[-500:])
        sys.exit(f"ncu: exit status {error.returncode}: {first}")
    found = lines(path, options.backend)
    summary = "".join(f"{said}\n" for said in found.values())
    (options.out / f"ncu-{options.backend}.summary").write_text(summary)
    print(summary)
    if missing := [name for name in KERNELS[options.backend] if name not in found]:
        sys.exit(f"ncu did not see {', '.join(missing)}")


if __name__ == "__main__":
    main()
