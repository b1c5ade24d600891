"""What was measured, read and written, and its figures as texts. There is no ratio but by `ratio`, which gives none
where a check failed."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..cases import COMPOSED, OPS, STEP, Case

IN_CACHE = 64 * 2**20  # bytes; a smaller problem is not bound by memory's bandwidth

Measured = dict[str, Any]  # what `contest.measure` gives


class Results(NamedTuple):
    machine: dict[str, Any]
    commit: str
    date: str
    cases: dict[Case, Measured]
    scaling: list[Measured] = []  # noqa: RUF012  # what `scaling.measure` gives

    @property
    def name(self) -> str:
        cpu = re.sub("[^a-z0-9]+", "-", self.machine["cpu"].lower()).strip("-")
        return f"{cpu}-{self.machine['threads']}-threads"


def load(paths: Iterable[Path]) -> Results:
    """The cases of all files, which must be of one machine; where a case is in several, the last counts."""
    machines, commits, dates, cases, scaling = [], [], [], {}, {}
    for path in paths:
        raw = json.loads(path.read_text())
        machines.append(raw["machine_info"])
        commits += re.sub("([0-9a-f]{9})[0-9a-f]*", r"\1", raw["commit_info"]["id"]).split(", ")
        commits[-1] += "-dirty" if raw["commit_info"].get("dirty") else ""
        dates.append(raw["datetime"][:10])
        for benchmark in raw["benchmarks"]:
            measured = benchmark["extra_info"]
            if "scaling" in measured:
                scaling[measured["scaling"], measured["mode"]] = measured
                continue
            cases[Case(measured["op"], tuple(measured["size"]), measured["mode"])] = measured
    if any(machine != machines[0] for machine in machines):
        raise ValueError(f"files of different machines or versions: {machines}")
    known = [case for name in (*OPS, *COMPOSED) for case in cases if case.name == name]
    commit = ", ".join(dict.fromkeys(commits))
    return Results(machines[0], commit, max(dates), {c: cases[c] for c in known}, list(scaling.values()))


def dump(results: Results) -> str:
    """Writes what `load` reads, a line for each case."""
    head = {"machine_info": results.machine, "commit_info": {"id": results.commit}, "datetime": results.date}
    lines = ",\n".join(json.dumps({"extra_info": _rounded(m)}) for m in (*results.cases.values(), *results.scaling))
    return json.dumps(head, indent=1)[:-2] + f',\n "benchmarks": [\n{lines}\n]}}\n'


def _rounded(x: Any) -> Any:
    if isinstance(x, dict):
        return {key: _rounded(value) for key, value in x.items()}
    return float(f"{x:.4g}") if isinstance(x, float) else x


# Figures.


def ratio(measured: Measured, who: str, time: str = "median") -> float | None:
    """The factor by which `who` is slower than fastvae, in `"median"` or `"cold"`; None where either was not timed,
    fastvae is not accurate, or `who` is wrong. A yardstick has no result to be wrong."""
    ours, other = measured["results"]["fastvae"], measured["results"].get(who, {})
    if time not in ours or time not in other or ours["verdict"] != "accurate":
        return None
    return None if other.get("verdict") == "wrong" else other[time] / ours[time]


def share(measured: Measured) -> float | None:
    """The share of the ceiling that fastvae reaches; None where the data may be in the caches."""
    work, ours = measured["work"], measured["results"]["fastvae"]
    if not work or "rate" not in work or "median" not in ours or ours["verdict"] != "accurate":
        return None
    if work["ceiling"] == "bandwidth" and work["amount"] < IN_CACHE:
        return None
    return work["amount"] / ours["median"] / work["rate"]


def peers_of(measured: Measured, time: str = "median") -> list[str]:
    """The peers with a ratio, fastest first; no yardsticks, and no variants of fastvae."""
    names = [
        name
        for name, r in measured["results"].items()
        if not name.startswith("fastvae") and "verdict" in r and ratio(measured, name, time) is not None
    ]
    return sorted(names, key=lambda name: measured["results"][name][time])


def time_text(seconds: float) -> str:
    value, unit = (
        (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms") if seconds >= 1e-3 else (seconds * 1e6, "µs")
    )
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def memory_text(count: float) -> str:
    mebibytes = count / 2**20
    return "< 1 MiB" if mebibytes < 1 else f"{mebibytes:.0f} MiB" if mebibytes < 1024 else f"{mebibytes / 1024:.1f} GiB"


def ratio_text(measured: Measured, who: str, time: str = "median") -> str:
    value = ratio(measured, who, time)
    return "" if value is None else f"{value:.2f}×" if value < 10 else f"{value:.0f}×"


def mark(result: dict[str, Any]) -> str:
    return {"inaccurate": " †", "wrong": " ‡"}.get(result.get("verdict", ""), "")


def size_text(case: Case) -> str:
    B, D = case.size
    if case.mode == STEP:
        return f"B {B:,}, D {D}"
    return f"{B:,} × {B:,}, D {D}" if case.op.of_pairs else f"[{B:,}, {D}]"


# Tables, in Markdown.


def table(head: Sequence[str], rows: Iterable[Sequence[str]], left: int = 1) -> list[str]:
    """A table, without the columns in which no row has anything."""
    rows = list(rows)
    used = [n for n in range(len(head)) if any(row[n] for row in rows) or not rows]
    line = "".join("|---" if n < left else "|--:" for n in used)
    first, *others = ("| " + " | ".join(row[n] for n in used) + " |" for row in (head, *rows))
    return [first, f"{line}|", *others]
