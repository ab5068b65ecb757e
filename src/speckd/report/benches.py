"""A folder that `speckd bench` wrote: its pictures and its tables as they are."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from speckd.report.files import read_lines

RESULTS, TABLES = "results.jsonl", "tables.md"
_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_BYTES = 8 * 2**20
_RULE = re.compile(r"^\|?[\s:|-]+\|?$")


@dataclass(frozen=True)
class Picture:
    name: str
    png: bytes


@dataclass(frozen=True)
class PlainTable:
    """Cells as text; `before`: what is said above it."""

    before: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Bench:
    """One benchmark. `runs`: lines of its results; `after`: what is said below the last table."""

    name: str
    runs: int
    tables: tuple[PlainTable, ...]
    after: str
    pictures: tuple[Picture, ...]
    notes: tuple[str, ...]


def is_bench(folder: Path) -> bool:
    return (folder / RESULTS).is_file()


def read_bench(folder: Path, name: str) -> Bench:
    """Raises DataError where the results are damaged; a missing or larger picture is noted."""
    lines, note = read_lines(folder / RESULTS)
    notes = [note] if note else []
    text = (folder / TABLES).read_text(encoding="utf-8", errors="replace") if (folder / TABLES).is_file() else ""
    tables, after = _tables(text)
    pictures = []
    for path in sorted(folder.glob("*.png")):
        data = path.read_bytes() if path.stat().st_size <= _MOST_BYTES else b""
        if data.startswith(_PNG):
            pictures.append(Picture(path.name, data))
        else:
            notes.append(f"{path.name} is no PNG of at most {_MOST_BYTES >> 20} MiB and is left out")
    return Bench(name, len(lines), tuple(tables), after, tuple(pictures), tuple(notes))


def _tables(text: str) -> tuple[list[PlainTable], str]:
    """Pipe tables of Markdown; what stands between them, without its marks."""
    found: list[PlainTable] = []
    said: list[str] = []
    rows: list[str] = []
    for line in [*text.split("\n"), ""]:
        if line.lstrip().startswith("|"):
            rows.append(line)
            continue
        if rows:
            found.append(PlainTable(" ".join(said), *_cells(rows)))
            said, rows = [], []
        if line.strip():
            said.append(line.strip().lstrip("#").strip())
    return found, " ".join(said)


def _cells(lines: list[str]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    split = [tuple(_split(line)) for line in lines if not _RULE.match(line.strip())]
    if not split:
        return (), ()
    width = len(split[0])
    return split[0], tuple((*row[:width], *[""] * (width - len(row))) for row in split[1:])


def _split(line: str) -> Iterator[str]:
    for cell in re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|")):
        yield cell.strip().replace("\\|", "|").replace("**", "").replace("`", "")
