"""Makes the report of what was measured:

    python -m bench.cpu.report FILE...             writes bench/results/<machine>/
    python -m bench.cpu.report --readme FILE...    and the README's section on performance
    python -m bench.cpu.report --targets FILE...   prints the ratios to reach, and those reached

Files are those of `pytest bench --benchmark-only --benchmark-json=FILE`, of one run or of several that each took a
part; or a results.json that this wrote.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..cases import Case
from ..targets import HEADLINES, MEMORY_TARGETS, TARGETS
from .results import (
    Measured,
    Results,
    dump,
    load,
    mark,
    memory_text,
    peers_of,
    ratio,
    ratio_text,
    share,
    size_text,
    table,
    time_text,
)
from .scaling import DECADES, FLAT, exponent, flat_from

BENCH = Path(__file__).parents[1]
README = BENCH.parent / "README.md"
BEGIN, END = "<!-- measured: written by python -m bench.cpu.report -->", "<!-- end of measured -->"


def full_tables(cases: Iterable[Measured]) -> Iterator[str]:
    """Everything that was measured: a table for each op and mode."""
    groups: dict[tuple[str, str], list[Measured]] = {}
    for measured in cases:
        groups.setdefault((measured["op"], measured["mode"]), []).append(measured)
    for (op, mode), group in groups.items():
        yield from ("", f"**{op}, {mode}**", "")
        rows = [row for measured in group for row in _rows(measured)]
        times = ("median", "quartiles", "ratio", "cold", "cold ratio")
        yield from table(("size", "who", *times, "peak extra memory", "error", "share of ceiling"), rows, left=2)


def _rows(measured: Measured) -> Iterator[tuple[str, ...]]:
    size = size_text(Case(measured["op"], tuple(measured["size"]), measured["mode"]))
    for name, r in measured["results"].items():
        first = name == "fastvae"
        what = (size if first else "", "**fastvae**" if first else name)
        if "why_not" in r:
            yield (*what, r["why_not"], *(7 * [""]))
            continue
        reached = share(measured) if first else None
        yield (
            *what,
            time_text(r["median"]) + mark(r),
            f"{time_text(r['low'])} to {time_text(r['high'])}",
            "" if first else ratio_text(measured, name),
            time_text(r["cold"]) if "cold" in r else "",
            "" if first else ratio_text(measured, name, "cold"),
            memory_text(r["bytes"]),
            f"{r['error']:.1e}" if "error" in r else "not compared",
            "" if reached is None else f"{reached:.0%} of {measured['work']['ceiling']}",
        )


def target_lines(results: Results) -> list[str]:
    rows = []
    for case, goals in TARGETS.items():
        for n, (who, goal) in enumerate(goals.items()):
            measured = results.cases.get(case)
            reached = ratio(measured, who) if measured else None
            verdict = "not measured" if reached is None else "yes" if reached >= goal else "no"
            what = f"{case.name}, {case.mode}, {size_text(case)}" if n == 0 else ""
            times = [_time(measured, name) for name in ("fastvae", who)] if measured else ["", ""]
            ratios = [ratio_text(measured, who, time) for time in ("median", "cold")] if measured else ["", ""]
            rows.append((what, *times, who, f"{goal:.2f}×", ratios[0], verdict, ratios[1]))
    for case, most in MEMORY_TARGETS.items():
        found = results.cases.get(case, {"results": {}})["results"].get("fastvae", {}).get("bytes")
        verdict = "not measured" if found is None else "yes" if found <= most else "no"
        reached_text = "" if found is None else memory_text(found)
        what = f"{case.name}, {case.mode}, {size_text(case)}"
        rows.append((what, "", "", "peak extra memory", f"≤ {memory_text(most)}", reached_text, verdict, ""))
    head = ("op, mode and size", "fastvae", "peer", "who", "target", "ratio", "reached", "cold")
    return table(head, rows)


def _time(measured: Measured, who: str, time: str = "median") -> str:
    r = measured["results"].get(who, {})
    return time_text(r[time]) + mark(r) if time in r else r.get("why_not", "")


def headline_lines(results: Results) -> list[str]:
    """A table of chosen cases: fastvae, the fastest peer, and the formula that people write."""
    rows = []
    for case in HEADLINES:
        if case not in results.cases:
            continue
        measured = results.cases[case]
        ours = measured["results"]["fastvae"]
        usual = "eager" if "eager" in measured["results"] else "eager_broadcast"
        why_not = measured["results"].get(usual, {}).get("why_not", "").partition(":")[0]
        fastest, memory = "none ran", ""
        peers = peers_of(measured)
        if peers:
            fastest = f"{peers[0]}, {_time(measured, peers[0])}, {ratio_text(measured, peers[0])}"
            memory = memory_text(measured["results"][peers[0]]["bytes"])
        what = (case.name, case.mode, size_text(case), _time(measured, "fastvae"))
        ours_memory = memory_text(ours["bytes"]) if "bytes" in ours else ""
        rows.append((*what, fastest, ratio_text(measured, usual) or why_not, ours_memory, memory))
    head = ("op", "mode", "size", "fastvae", "fastest peer", "eager formula", "memory", "fastest peer's")
    return table(head, rows, left=3)


def slower_lines(results: Results, time: str = "median") -> list[str]:
    """A list of the cases in which a peer is faster."""
    found = []
    for case, measured in results.cases.items():
        first = next(iter(peers_of(measured, time)), None)
        if first is not None and (ratio(measured, first, time) or 1) < 1:
            place = f"{case.name} {case.mode} {size_text(case)}"
            found.append(f"{place}: {first}{mark(measured['results'][first])} {ratio_text(measured, first, time)}")
    count = f"{len(found)} of {len(results.cases)}"
    return (
        [f"Where a peer is faster ({count} cases): {'; '.join(found)}."] if found else ["No peer is faster anywhere."]
    )


def cold_ones(results: Results) -> Results:
    """The cases that were timed cold too."""
    return results._replace(cases={c: m for c, m in results.cases.items() if "cold" in m["results"]["fastvae"]})


def cold_lines(cold: Results) -> list[str]:
    """A table of what is timed cold: fastvae, and the fastest peer; and where that is faster."""
    rows = []
    for case, measured in cold.cases.items():
        times = [_time(measured, "fastvae", time) for time in ("median", "cold")]
        peers = peers_of(measured, "cold")[:1]
        peer = [f"{who}, {_time(measured, who, 'cold')}, {ratio_text(measured, who, 'cold')}" for who in peers]
        rows.append((case.name, case.mode, size_text(case), *times, *(peer or ["none ran"])))
    head = ("op", "mode", "size", "fastvae", "cold", "fastest peer, cold")
    return [*table(head, rows, left=3), "", *slower_lines(cold, "cold")]


def scaling_lines(results: Results) -> Iterator[str]:
    """A table of how cost grows with elements: a row for each ladder of sizes and number of threads."""
    rows = []
    for m in results.scaling:
        elements = m["elements"]
        for threads, times in m["seconds"].items():
            cost = [t / e * 1e12 for t, e in zip(times, elements, strict=True)]
            flat = flat_from(elements, times)
            what = f"{m['scaling']}, {m['mode']}, D {m['D']}" if threads == "1" else ""
            best = min(range(len(cost)), key=cost.__getitem__)
            figures = (f"{exponent(elements, times):.2f}", f"{cost[-1]:.3g} ps", f"{m['sizes'][flat]:,}")
            speed_up = m["seconds"]["1"][-1] / times[-1]
            rows.append((what, threads, *figures, f"{cost[best]:.3g} ps at {m['sizes'][best]:,}", f"{speed_up:.2f}×"))
    head = ("op, mode", "threads", "exponent", "an element at the largest", "the same from B", "least", "speed-up")
    if rows:
        yield from table(head, rows)


NOTES = """\
Times are medians of repeats in which all contestants take turns, on inputs written anew before each; a ratio is the
other's time over fastvae's. Memory is how far a call raises the process's resident memory. The error is the largest
difference from float64 relative to the largest value, over results, or gradients where there is a backward; † marks
one above four times what half an ulp in the inputs and float32's eps come to; ‡ one above 0.001, which gets no ratio.
A contestant may allocate 4 GiB and take about 4 s, longer where a ceiling of the machine is lower; one that cannot says
so. Compilation is not timed. A share of a ceiling above 100% says that not all of the work was done: pairs too far
apart are left out, and marginals tabulated (docs/beyond-brute-force.md)."""

COLD_NOTES = """\
A turn is one call, or, of calls below 10 ms, twenty in a row after one that is not timed; each is timed by itself, all
contestants' by one clock. Cold calls are those that follow a sweep over 8 MB, each of them, as in a training loop: not
only inputs but also programs have to come from the outer caches. They are timed of small cases, forward + backward, in
turns too; a figure is the median of a hundred, or fewer of what takes long."""

SCALING_NOTES = f"""\
Elements are S·N·D, for kl_gauss and reparameterize B·D; B doubles from 32. The exponent is fitted over the {DECADES}
decades below the largest size. A cost per element is called the same within a factor of {FLAT}; where it rises again at
the largest elementwise sizes, results are over 32 MiB, for which the allocator takes fresh pages each time."""


def about(results: Results) -> str:
    m = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return (
        f"{m['cpu']}, {m['threads']} threads, {m['memory'] / 2**30:.0f} GiB; {m['fastvae']}; {versions}; "
        f"Python {m['python']}; commit {results.commit}; {results.date}."
    )


def document(results: Results) -> str:
    ceilings = {
        m["work"]["ceiling"]: m["work"]["rate"] for m in results.cases.values() if m["work"] and "rate" in m["work"]
    }
    units = {"fma": "FMA/s", "exponentials": "exponentials/s", "bandwidth": "bytes/s copied, read plus written"}
    cold = cold_ones(results)
    measured = ", ".join(f"{ceilings[name] / 1e9:.3g}e9 {unit}" for name, unit in units.items() if name in ceilings)
    lines = [
        *(f"# {results.machine['cpu']}, {results.machine['threads']} threads", ""),
        *("`make bench`, which ends with `python -m bench.cpu.report`. " + about(results), ""),
        *(f"Ceilings, measured in the same run: {measured}.", "", NOTES, ""),
        *((COLD_NOTES, "") if cold.cases else ()),  # before there were cold calls there were no turns of twenty either
        *("![Time against the size](time.png)", ""),
        *("![Peak extra memory against the size](memory.png)", ""),
        *("![Error against time](error.png)", ""),
        *("## In short", "", *headline_lines(results), "", *slower_lines(results), ""),
        *(("## Cold calls", "", *cold_lines(cold), "") if cold.cases else ()),
        *("## Targets", "", *target_lines(results), ""),
        *("## Scaling", "", SCALING_NOTES, "", *scaling_lines(results), ""),
        *("## Everything", *full_tables(results.cases.values())),
    ]
    return "\n".join(lines) + "\n"


def section(results: Results) -> str:
    """The text that stands in the README between the markers."""
    folder = f"bench/results/{results.name}"
    cold = cold_ones(results)
    lines = [
        *("On " + about(results), ""),
        *(*headline_lines(results), ""),
        *(*slower_lines(results), ""),
        *((f"Cold calls. {slower_lines(cold, 'cold')[0]}", "") if cold.cases else ()),
        f"† less accurate than a float32 program need be. [All cases, peers, errors and memory]({folder}/README.md); ",
        *("how they are measured stands there too.", ""),
        f"![Time against the size]({folder}/time.png)",
    ]
    return "\n".join(lines) + "\n"


def between_markers(text: str) -> str:
    return text.partition(BEGIN + "\n")[2].partition(END)[0]


def with_section(text: str, content: str) -> str:
    before, begin, rest = text.partition(BEGIN + "\n")
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"expected the lines {BEGIN!r} and {END!r}")
    return before + begin + content + end + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--targets", action="store_true")
    parser.add_argument("--readme", action="store_true")
    options = parser.parse_args()
    results = load(options.files)
    if options.targets:
        print("\n".join(target_lines(results)))
        return
    from ..pictures import races as pictures

    folder = BENCH / "results" / results.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(dump(results))
    results = load([folder / "results.json"])  # the figures are those of the file
    (folder / "README.md").write_text(document(results))
    pictures.draw(results.cases, folder)
    if options.readme:
        README.write_text(with_section(README.read_text(), section(results)))
    print(folder)


if __name__ == "__main__":
    main()
