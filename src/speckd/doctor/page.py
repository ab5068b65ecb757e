"""`speckd doctor` as people read it, and as JSON lines for machines."""

import json
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.text import Text

from speckd.doctor.examine import examined
from speckd.doctor.findings import Finding, Found, JudgedToken, Level, Sample

_SIGNS = {Level.OK: "ok", Level.NOTE: "note", Level.WARNING: "WARNING", Level.FAILURE: "FAILURE"}
_STYLES = {Level.OK: "green", Level.NOTE: "cyan", Level.WARNING: "bold yellow", Level.FAILURE: "bold red"}
_INDENT = " " * 11
#: Of a sample, supervised tokens in the table: the first and the last; letters of an unsupervised stretch.
_FIRST, _LAST, _STRETCH = 12, 3, 240


def doctor(config: Path | None, recipe: str | None, flags: list[str], as_json: bool, thorough: bool) -> bool:
    """Prints what is found, as it is found; True where nothing would go wrong. Trains nothing, and leaves nothing on disk.

    Args:
        config, recipe, flags: as for `speckd train`.
        as_json: one JSON object a line.
        thorough: read every byte of a cache, however large.
    """
    levels: Counter[Level] = Counter()
    found = _counted(examined(config, recipe, flags, thorough), levels)
    (_print_json if as_json else _print_page)(found, levels)
    return not levels[Level.FAILURE]


def _counted(found: Iterable[Found], levels: Counter[Level]) -> Iterable[Found]:
    for one in found:
        if isinstance(one, Finding):
            levels[one.level] += 1
        yield one


def _print_json(found: Iterable[Found], levels: Counter[Level]) -> None:
    for one in found:
        print(json.dumps(asdict(one) if isinstance(one, Finding) else {"sample": asdict(one)}), flush=True)
    print(json.dumps({"summary": {level: levels[level] for level in Level}}), flush=True)


def _print_page(found: Iterable[Found], levels: Counter[Level]) -> None:
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True)
    group = None
    for one in found:
        if isinstance(one, Sample):
            console.print(Text(f"\nA sample: row {one.row}, {one.length} tokens, {len(one.tokens)} supervised", style="bold"))
            for line in sample_lines(one):
                console.print(line)
            group = None
            continue
        if one.about is not group:
            console.print(Text(f"\n{one.about}" if group or levels.total() > 1 else str(one.about), style="bold"))
            group = one.about
        for line in _finding_lines(one, shutil.get_terminal_size().columns if console.is_terminal else None):
            console.print(line)
    console.print(_summary(levels))


def _finding_lines(one: Finding, width: int | None) -> Iterable[Text]:
    """`width`: of the terminal; None: no line is broken, so that they can be searched."""
    said = _wrapped(one.what, width)
    yield Text.assemble((f"  {_SIGNS[one.level]:<9}", _STYLES[one.level]), said[0])
    yield from (Text(_INDENT + line) for line in said[1:])
    if one.fix:
        first, *rest = _wrapped(f"→ {one.fix}", width)
        yield Text(_INDENT + first, style="bold")
        yield from (Text(f"{_INDENT}  {line}", style="bold") for line in rest)


def _wrapped(text: str, width: int | None) -> list[str]:
    if width is None:
        return [text]
    return textwrap.wrap(text, max(40, width - len(_INDENT) - 3), break_long_words=False, break_on_hyphens=False) or [""]


def _summary(levels: Counter[Level]) -> Text:
    warnings, failures = levels[Level.WARNING], levels[Level.FAILURE]
    also = f"; {_plural(warnings, 'warning')}" if warnings else ""
    if failures:
        return Text(f"\n{_plural(failures, 'failure')}: this run would go wrong{also}.", style="bold red")
    return Text(f"\nNothing would go wrong{also}.", style="bold yellow" if warnings else "bold green")


def _plural(count: int, name: str) -> str:
    return f"{count} {name}{'' if count == 1 else 's'}"


# ---- the sample ------------------------------------------------------------------------------------------------------------


def sample_lines(one: Sample) -> Iterable[Text]:
    """Its text, supervised stretches in brackets; then a table of the supervised tokens."""
    text = Text("  ")
    for piece, supervised in one.pieces:
        if supervised:
            text.append("⟦", style="dim").append(_clipped(piece)).append("⟧", style="dim")
        else:
            text.append(_clipped(piece), style="dim")
    yield from (line if not at else Text("  ") + line for at, line in enumerate(text.split("\n", allow_blank=True)))
    judged = "; below: + accepted, − rejected by the gate" if any(token.acceptance is not None for token in one.tokens) else ""
    yield Text(f"  ⟦ ⟧: supervised{judged}; = the data's token")
    tokens, gap = list(one.tokens), len(one.tokens) - _FIRST - _LAST
    left_out = gap > 1
    rows = [*tokens[:_FIRST], *tokens[-_LAST:]] if left_out else tokens
    cells = [("place", "token", "student", "verdict", "p student", "p teacher", "teacher"), *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for number, (row, token) in enumerate(zip(cells, (None, *rows), strict=True)):
        yield _row(row, widths, token)
        if left_out and number == _FIRST:
            yield Text(f"  … {gap} more", style="dim")


def _cells(token: JudgedToken) -> tuple[str, ...]:
    accepted, favourite = token.acceptance, token.favourite
    verdict = "" if accepted is None else f"{'+' if accepted >= 0.5 else '−'} {accepted:.2f}"
    return (
        f"{token.position}",
        f"'{token.token}'",
        "=" if token.proposal == token.token else f"'{token.proposal}'",
        verdict,
        f"{token.student:.3f}",
        "" if token.teacher is None else f"{token.teacher:.3f}",
        "" if favourite is None else "=" if favourite == token.token else f"'{favourite}'",
    )


def _row(cells: tuple[str, ...], widths: list[int], token: JudgedToken | None) -> Text:
    style = "dim"
    if token is not None:
        style = "" if token.acceptance is None else "green" if token.acceptance >= 0.5 else "red"
    line = Text("  ")
    for place, (cell, width) in enumerate(zip(cells, widths, strict=True)):
        coloured = style if token is None or place in (1, 2, 3) else ""
        line.append(f"{cell:<{width}}  ", style=coloured)
    line.rstrip()
    return line


def _clipped(text: str) -> str:
    half = _STRETCH // 2
    return text if len(text) <= _STRETCH + 20 else f"{text[:half]} … {text[-half:]}"
