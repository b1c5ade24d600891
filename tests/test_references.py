"""docs/references.md lists what the repository cites, and where; and no file names a page that is not there."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "references.md"
FOLDERS = ("fastvae", "kernels", "bench", "examples", "tests", "docs")
FILES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CMakeLists.txt")
SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cmake", ".sh", ".md")

# A paper is cited by author and year, as in "Chen et al. 2018", "Kingma & Welling (2014)" or "Kong 1992.", and now and
# then a second time by its author alone, "Chen et al."
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
NAME = rf"(?!(?:{MONTHS})\b)[A-Z][a-zà-ž]+"
YEAR = r"\(?((?:18|19|20)\d\d)\b"
PAPER = re.compile(rf"\b({NAME}(?: et al\.| (?:&|and) {NAME})),? {YEAR}|\b({NAME}) {YEAR}(?=[.,;:)])")
NO_YEAR = re.compile(rf"\b({NAME} et al\.)(?!,? {YEAR})")
# Of notes and papers, equations and sections: "Zheng, eq. 24, 25 and 29", "Basics VAE, sections 1.3 and 3".
NOTES = ("Zheng", "Basics VAE")
SOURCE = re.compile(rf"\b(?P<notes>{'|'.join(NOTES)})\b|{PAPER.pattern}")
PART = re.compile(r"\b(eq\.|sections?) (\d+(?:\.\d+)*(?:(?:-|–| to |, and |, | and )\d+(?:\.\d+)*)*)", re.IGNORECASE)
REACH = 40  # characters between a source's name and what is cited of it, at most
# What goes by a name alone.
METHODS = {
    "Box & Muller 1958": r"\bBox[-–]Muller",
    "Clenshaw 1955": r"\bClenshaw",
    "Kahan 1965": r"\bKahan",
    "Markov 1889": r"\bMarkov's inequality",
    "Scott 1992": r"\bScott's rule",
}
BUG = re.compile(r"\bGCC bug \d+")
WRITTEN = ("peers.md", "sanity.md", "table.md")  # by benchmarks, not pages of the repository

Cited = dict[str, set[str]]  # the files that cite a source, or a part of it


def files() -> Iterator[Path]:
    found = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SUFFIXES]
    for path in [*found, *(ROOT / name for name in FILES)]:
        if path not in (PAGE, Path(__file__)):
            yield path


def prose(text: str) -> str:
    """The text on one line, without what begins the lines of a comment."""
    return re.sub(r"\s*\n[ \t]*(?:#+ |//+ |\* )?[ \t]*", " ", text)


def key(match: re.Match[str]) -> str:
    """How the page lists a paper."""
    groups = [group for group in match.groups() if group not in (None, *NOTES)]
    return f"{groups[0]} {groups[1]}".replace(" and ", " & ")


def numbers(text: str) -> list[str]:
    """ "17-19 and 24" as 17, 18, 19, 24"""
    found: list[str] = []
    for part in re.split(r", and |, | and ", text):
        first, *last = re.split(r"-|–| to ", part)
        found += map(str, range(int(first), int(last[0]) + 1)) if last else [first]
    return found


def part_of(source: str, kind: str, number: str) -> str:
    return f"{source}, {'eq.' if kind.startswith('eq') else 'section'} {number}"


def citations(text: str) -> Iterator[str]:
    """All that is cited, as the page lists it; "?" stands for a source that is not said."""
    text = prose(text)
    yield from (key(match) for match in PAPER.finditer(text))
    yield from (match[1] for match in NO_YEAR.finditer(text))
    yield from (match[0] for match in BUG.finditer(text))
    yield from (name for name, pattern in METHODS.items() if re.search(pattern, text))
    for match in PART.finditer(text):
        *_, last = [None, *SOURCE.finditer(text, max(0, match.start() - REACH), match.start())]
        source = "?" if last is None else last["notes"]
        if source:  # of a paper the page lists no parts
            yield from (part_of(source, match[1].lower(), number) for number in numbers(match[2]))


def cited() -> Cited:
    found: Cited = defaultdict(set)
    for path in files():
        for what in citations(path.read_text(encoding="utf-8")):
            found[what].add(path.relative_to(ROOT).as_posix())
    return found


def listed() -> Cited:
    """What the page lists, with the files that it says cite it: entries "- **Chen et al. 2018.** ...", and in the
    sections named after notes the rows of a table, "| eq. 17 to 19 | formula | files |"."""
    found: Cited = {}
    notes = ""
    for block in re.split(r"\n(?=#|- |\| )", PAGE.read_text(encoding="utf-8")):
        paths = set(re.findall(r"`([\w/.-]+\.\w+)`", block))
        if heading := re.match(r"#+ (.*)", block):
            notes = next((name for name in NOTES if heading[1].startswith(name)), "")
        elif entry := re.match(r"- \*\*(.+?)\.?\*\*", block):
            found[entry[1]] = paths
        elif notes and (row := re.match(rf"\| {PART.pattern} \|", block, re.IGNORECASE)):
            found |= {part_of(notes, row[1].lower(), number): paths for number in numbers(row[2])}
    return found


def with_years(found: Cited, there: Cited) -> Cited:
    """What is cited as "Chen et al.", with the one listed paper of these authors."""
    full: Cited = defaultdict(set)
    for what, paths in found.items():
        papers = [paper for paper in there if what.endswith("et al.") and paper.startswith(f"{what} ")]
        full[papers[0] if len(papers) == 1 else what] |= paths
    return full


def corrections(found: Cited, there: Cited) -> list[str]:
    """What to change on the page, so that each source is listed with the files that cite it, and with no others."""
    wrong = []
    for what in sorted(found.keys() | there.keys()):
        citing, named = found.get(what, set()), there.get(what, set())
        if what.startswith("?"):
            wrong += [f"{path} cites {what[3:]}, and not of what" for path in sorted(citing)]
        elif what not in there:
            wrong.append(f"{what}: add an entry, with {', '.join(sorted(citing))}")
        elif not citing:
            wrong.append(f"{what}: remove the entry, as no file cites it")
        else:
            wrong += [f"{what}: add {path}" for path in sorted(citing - named)]
            wrong += [f"{what}: remove {path}" for path in sorted(named - citing)]
    return wrong


def test_page_lists_what_is_cited_and_where() -> None:
    there = listed()
    wrong = corrections(with_years(cited(), there), there)
    assert not wrong, "docs/references.md:\n" + "\n".join(wrong)


def test_corrections_say_what_to_do() -> None:
    there = {"Doe et al. 2031": {"a.py", "b.py"}, "Moe 2033": {"a.py"}}
    found = {"Doe et al. 2031": {"a.py"}, "Doe et al.": {"c.py"}, "Roe 2032": {"b.py"}, "?, section 5": {"d.py"}}
    assert corrections(with_years(found, there), there) == [
        "d.py cites section 5, and not of what",
        "Doe et al. 2031: add c.py",
        "Doe et al. 2031: remove b.py",
        "Moe 2033: remove the entry, as no file cites it",
        "Roe 2032: add an entry, with b.py",
    ]


def test_citations_are_found() -> None:
    """So that these tests cannot pass by finding nothing."""
    found = cited()
    assert sum(bool(re.fullmatch(r".* \d{4}", what)) for what in found) >= 20, "papers"
    assert sum(what.startswith(NOTES) and "eq." in what for what in found) >= 30
    assert sum(what.startswith(NOTES) and "section" in what for what in found) >= 4
    text = "# As Doe et al.\n# 2031 and Roe & Poe (2032) say\n// in Zheng, eq. 3-5 and 7; Moe 2033, eq. 1; see eq. 2."
    made_up = ["Doe et al. 2031", "Roe & Poe 2032", "Moe 2033", *(f"Zheng, eq. {n}" for n in (3, 4, 5, 7))]
    assert list(citations(text)) == made_up
    assert list(citations("Below 2000 columns, in May 2026. Design, section 5: of no source.")) == ["?, section 5"]


def test_pages_that_are_named_exist() -> None:
    """Beside the file that names them, in the root, or in docs/."""
    without_results = not (ROOT / "bench" / "results").is_dir()  # as in the source distribution
    missing = []
    for path in (*files(), PAGE):
        for name in sorted(set(re.findall(r"(?<![\w:])[\w./-]*\w\.md\b", path.read_text(encoding="utf-8")))):
            if name in WRITTEN or (without_results and "bench/results/" in name):
                continue
            if not any((folder / name.lstrip("/")).is_file() for folder in (path.parent, ROOT, ROOT / "docs")):
                missing.append(f"{path.relative_to(ROOT).as_posix()}: {name}")
    assert not missing, "these files name pages that are not there:\n" + "\n".join(missing)
