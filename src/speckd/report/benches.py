"""A folder that `speckd bench` wrote: its pictures, and its tables as they are."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from speckd.checked_files import Fields, read_lines

RESULTS, TABLES, KEPT = "results.jsonl", "tables.md", "runs"
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_BYTES = 8 * 2**20
_RULE = re.compile(r"^\|?[\s:|-]+\|?$")
#: What it keeps of a run is called by its key.
_KEY = re.compile(r"(made-)?[0-9a-f]{20}\.json")
#: What the benchmark sets in bold: numbers, the word in its legend, and that runs are missing. No name is.
_BOLD = re.compile(r"\*\*(bold|Incomplete|[+−-]?\d[\d.,]*)\*\*")
#: What its pictures show, by how their names begin.
_SHOWN = {
    "dose": "Each measure by the share of positions at which the teacher was scrambled; means over seeds, 95 % t-intervals.",
    "front": "NLL against α, a panel for each cell: up and to the left is better at both; the line joins what none beats.",
}


_UNITS = ((3600, "hours"), (60, "minutes"), (1, "seconds"))


@dataclass(frozen=True)
class Picture:
    """`width`: in points; `shows`: in words, where it is one of the benchmark's."""

    name: str
    png: bytes
    width: int
    shows: str


@dataclass(frozen=True)
class Span:
    text: str
    bold: bool


Text: TypeAlias = tuple[Span, ...]


@dataclass(frozen=True)
class Paragraph:
    text: Text


@dataclass(frozen=True)
class PlainTable:
    """Cells as text. `number`: in its benchmark, from 1."""

    number: int
    head: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]


@dataclass
class Part:
    """What stands below a heading, up to the next of its level; `parts`: those of the next level."""

    title: str
    blocks: list[Paragraph | PlainTable] = field(default_factory=list)
    parts: list["Part"] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """One benchmark. `size`: how much was run, in words; `part`: all that its tables say, and its pictures; `notes`: what is
    missing or cut off, a line each."""

    name: str
    finished: bool
    size: str
    part: Part
    notes: tuple[str, ...]


def is_bench(folder: Path) -> bool:
    """Also one that is running: what it keeps are runs by their keys, and nothing but."""
    kept = folder / KEPT
    return (folder / RESULTS).is_file() or (kept.is_dir() and all(_KEY.match(path.name) for path in kept.iterdir()))


def read_bench(folder: Path, name: str) -> Bench:
    """Raises DataError where the results are damaged; a missing or larger picture is noted."""
    if not (folder / RESULTS).is_file():
        kept = sum(not path.name.startswith("made-") for path in (folder / KEPT).glob("*.json"))
        unfinished = (
            f"This benchmark has not finished: there is no {RESULTS} yet, and {kept} of its runs are kept. "
            "The same speckd bench command goes on."
        )
        return Bench(name, False, "", Part(name), (unfinished,))
    lines, note = read_lines(folder / RESULTS)
    notes = [note] if note else []
    path = folder / TABLES
    if not path.is_file():
        notes.append(f"There is no {TABLES}: the same speckd bench command writes it.")
    part = _part(name, path.read_text(encoding="utf-8", errors="replace") if path.is_file() else "")
    for picture in _pictures(folder, notes):
        own = [one for one in part.parts if Path(picture.name).stem.endswith(f"-{_as_file(one.title)}")]
        (own[0] if len(own) == 1 else part).pictures.append(picture)
    return Bench(name, True, _size(lines), part, tuple(notes))


def _size(lines: list[Fields]) -> str:
    cells = {repr(sorted(line.object("cell").values.items())) for line in lines}
    seeds = {line.whole("seed") for line in lines}
    seconds = sum(line.maybe_number("seconds") or 0.0 for line in lines)
    spent = next(f"{seconds / size:.1f} {unit}" for size, unit in _UNITS if seconds >= size or size == 1)
    return (
        f"{len(lines)} runs: {len(cells)} cells (block, start, teacher, data and method), up to {len(seeds)} seeds of each; "
        f"{spent} of one process, tuning and teachers not counted."
    )


def _pictures(folder: Path, notes: list[str]) -> Iterator[Picture]:
    for path in sorted(folder.glob("*.png")):
        data = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b""
        if data.startswith(_PNG) and len(data) > 24:
            shows = _SHOWN.get(path.name.split("-")[0], "")
            yield Picture(path.name, data, int.from_bytes(data[16:20], "big"), shows)
        else:
            notes.append(f"{path.name} is no PNG of at most {_MOST_BYTES >> 20} MiB and is left out")


def _as_file(title: str) -> str:
    """As the benchmark names the pictures of a block."""
    return "".join(letter if letter.isalnum() else "-" for letter in title).strip("-")


# ---- its Markdown ----------------------------------------------------------------------------------------------------------


def _part(name: str, text: str) -> Part:
    """Headings of two levels, paragraphs and pipe tables: the benchmark writes nothing else."""
    whole = Part(name)
    open_parts, said, rows = [whole], list[str](), list[str]()
    tables = 0
    for line in [*text.split("\n"), ""]:
        heading = re.match(r"(#+)\s+(.*)", line)
        is_row = line.lstrip().startswith("|")
        if rows and not is_row:
            tables += 1
            open_parts[-1].blocks.append(_table(tables, rows))
            rows = []
        if said and (is_row or heading or not line.strip()):
            open_parts[-1].blocks.append(Paragraph(_spans(" ".join(said))))
            said = []
        if heading:
            level = min(len(heading[1]), 3) - 1 if len(open_parts) > 1 else 1
            del open_parts[max(1, level) :]
            open_parts.append(Part(heading[2].strip()))
            open_parts[-2].parts.append(open_parts[-1])
        elif is_row:
            rows.append(line)
        elif line.strip():
            said.append(line.strip())
    return whole


def _table(place: int, lines: list[str]) -> PlainTable:
    head, *rows = [tuple(_split(line)) for line in lines if not _RULE.match(line.strip())] or [()]
    cut = [(*row[: len(head)], *[""] * (len(head) - len(row))) for row in rows]
    return PlainTable(place, head, tuple(tuple(map(_spans, row)) for row in cut))


def _split(line: str) -> Iterator[str]:
    for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|")):
        yield cell.strip().replace("\\|", "|")


def _spans(text: str) -> Text:
    """What is bold lies between what is not."""
    return tuple(Span(part, bool(place % 2)) for place, part in enumerate(_BOLD.split(text)) if part)
