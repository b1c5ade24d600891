"""The report's pictures: time and memory against the size, and error against time."""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, NullLocator

from fastvae.evaluation import plots

from ..cases import BOTH, FORWARD, STEP, Case
from ..cpu.results import Measured, ratio

# Colour says by which means, marker and line by which formula.
LOOKS: dict[str, tuple[str, str, str]] = {
    "fastvae": (plots.DATA, "o", "-"),
    "fastvae_compiled": (plots.DATA, "D", "--"),
    "eager_broadcast": (plots.MODEL, "s", "-"),
    "eager_gemm": (plots.MODEL, "^", "--"),
    "compiled_broadcast": ("#e08e1b", "s", "-"),
    "compiled_gemm": ("#e08e1b", "^", "--"),
    "compiled_marginals": ("#e08e1b", "s", "-"),
    "keops": ("#2f8f5b", "v", "-"),
    "torch_distributions": (plots.MUTED, "P", "-"),
    "sklearn_gmm": ("#7b5ea7", "X", "-"),
}
SUBPLOTS = (
    ("agg_log_prob", FORWARD),
    ("agg_log_prob", BOTH),
    ("training_step", STEP),
    ("agg_log_prob_marginals", FORWARD),
    ("agg_log_prob_marginals", BOTH),
    ("full_dataset", FORWARD),
)
DIMENSIONS = {"training_step": 10, "full_dataset": 10}  # of these subplots; 32 in the others
Value = Callable[[dict[str, Any]], float]


def draw(cases: dict[Case, Measured], folder: Path) -> None:
    size = (13.0, 7.4)
    plots.save(folder / "time.png", size, functools.partial(against_size, cases, "median", "time of a call", _time))
    memory = functools.partial(against_size, cases, "bytes", "peak extra memory of a call", _mebibytes)
    plots.save(folder / "memory.png", size, memory)
    plots.save(folder / "error.png", (13.0, 4.2), functools.partial(error_against_time, cases))


def against_size(
    cases: dict[Case, Measured], key: str, title: str, unit: Callable[[float, Any], str], figure: Any
) -> None:
    """A subplot for each op and mode, a line for each contestant, with a cross where it ends before the others do."""
    seen: dict[str, Any] = {}
    for axes, (name, mode) in zip(figure.subplots(2, 3).flat, SUBPLOTS, strict=True):
        D = DIMENSIONS.get(name, 32)
        row = {c.size[0]: m["results"] for c, m in cases.items() if (c.name, c.mode, c.size[1]) == (name, mode, D)}
        for who, look in LOOKS.items():
            points = [(B, _value(key, r[who][key])) for B, r in row.items() if key in r.get(who, {})]
            if not points:
                continue
            seen[who] = _line(axes, points, look, hollow=[_inaccurate(row[B][who]) for B, _ in points])
            if points[-1][0] < max(row):
                axes.plot(*points[-1], "x", color=look[0], ms=11, mew=2)
        axes.set(
            xscale="log", yscale="log", title=f"{name}, {mode}, D {D}", xlabel="N" if name == "full_dataset" else "B"
        )
        crowded = any(b < 3 * a for a, b in itertools.pairwise(sorted(row)))
        axes.set_xticks(list(row), [f"{B:,}" for B in row], rotation=40 if crowded else 0)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(unit))
        axes.grid(axis="y", color="#e8e8e8", lw=0.8)
    figure.suptitle(f"{title[0].upper()}{title[1:]}; hollow: inaccurate; ✕: out of memory, or too slow, beyond this")
    figure.legend(seen.values(), seen, loc="outside right center", frameon=False)


def error_against_time(cases: dict[Case, Measured], figure: Any) -> None:
    """A subplot for each of some cases: a point for each contestant, and the bound."""
    chosen = [
        case
        for name, mode in (("agg_log_prob", FORWARD), ("agg_log_prob", BOTH), ("agg_log_prob_marginals", FORWARD))
        if (case := Case(name, (1024, 32), mode)) in cases and "bound" in cases[case]["results"]["fastvae"]
    ]
    seen: dict[str, Any] = {}
    if not chosen:
        return
    for axes, case in zip(figure.subplots(1, len(chosen), squeeze=False).flat, chosen, strict=True):
        measured = cases[case]
        for who, look in LOOKS.items():
            r = measured["results"].get(who, {})
            if ratio(measured, who) is not None and "error" in r:
                seen[who] = _line(axes, [(r["median"], r["error"])], look, hollow=[_inaccurate(r)], size=9)
        bound = measured["results"]["fastvae"]["bound"]
        axes.axhline(bound, color=plots.MUTED, lw=1, ls="--")
        axes.set(xscale="log", yscale="log", title=f"{case.name}, {case.mode}", xlabel="time of a call")
        axes.xaxis.set_major_formatter(FuncFormatter(_time))
        axes.annotate(
            "bound", (1, bound), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=plots.MUTED
        )
    figure.supylabel("error, relative", fontsize=10)
    figure.suptitle("1024 × 1024, D 32")
    figure.legend(seen.values(), seen, loc="outside right center", frameon=False)


def _line(
    axes: Any, points: Sequence[tuple[float, float]], look: tuple[str, str, str], hollow: list[bool], size: float = 5
) -> Any:
    color, marker, style = look
    ours = color == plots.DATA
    (line,) = axes.plot(
        *zip(*points, strict=True), color=color, ls=style, lw=2.4 if ours else 1.3, zorder=3 if ours else 2
    )
    for point, empty in zip(points, hollow, strict=True):
        axes.plot(*point, marker, color=color, ms=size, mfc="white" if empty else color, zorder=4)
    line.set_marker(marker)
    line.set_markevery([])  # markers for the legend alone
    return line


def _inaccurate(result: dict[str, Any]) -> bool:
    return result.get("verdict") != "accurate"


def _value(key: str, value: float) -> float:
    """Seconds, or MiB; the kernel's counters see no less than a quarter of one."""
    return max(value / 2**20, 0.25) if key == "bytes" else value


def _time(seconds: float, _: Any = None) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:g} µs"


def _mebibytes(count: float, _: Any = None) -> str:
    return f"{count:,.3g} MiB" if count < 1000 else f"{count:,.0f} MiB"
