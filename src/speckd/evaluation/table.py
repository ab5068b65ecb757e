"""What was found, for people."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def show(results: Mapping[str, Any]) -> None:
    """One table for all tasks of an evaluation."""
    table = Table()
    for name in ("task", "metric", "value", "interval", "n", "of"):
        table.add_column(name, justify="right" if name in ("value", "n") else "left", overflow="fold")
    for task, found in results["tasks"].items():
        for number, (name, metric) in enumerate(found["metrics"].items()):
            row = (name, digits(metric["value"]), bounds(metric), str(metric["n"]), metric["of"])
            table.add_row(task if number == 0 else "", *row, end_section=number == len(found["metrics"]) - 1)
    console = _console()
    console.print(f"{results['model']['path']}; 95 % intervals by bootstrap over examples", soft_wrap=True, highlight=False)
    console.print(table)
    for task, found in results["tasks"].items():
        console.print(f"{task}: " + ", ".join(f"{count:,} {name}" for name, count in found["counts"].items()))
        if found["kind"] == "draft":
            for note in _rounded(results):
                console.print(f"{task}: {note}", soft_wrap=True, highlight=False)


def _rounded(results: Mapping[str, Any]) -> list[str]:
    """What a reader of a draft task's numbers must know of 16-bit models."""
    dtypes = {results[whose]["dtype"] for whose in ("model", "teacher")} & {"bfloat16", "float16"}
    return [
        f"in {dtype} tokens may tie within rounding: greedy texts may then differ, and tau from its expectation"
        for dtype in sorted(dtypes)
    ]


def show_comparison(rows: Sequence[Mapping[str, Any]]) -> None:
    """One line for each metric of each pair."""
    table = Table(title="Paired by prompt: second less first, 95 % intervals by bootstrap over pairs", title_justify="left")
    for name in ("task", "metric", "first", "second", "difference", "interval", "pairs"):
        table.add_column(name, justify="left" if name in ("task", "metric") else "right", overflow="fold")
    for row in rows:
        values = (digits(row[name]) for name in ("first", "second", "difference"))
        table.add_row(row["task"], row["metric"], *values, bounds(row), str(row["n"]))
    _console().print(table)


def _console() -> Console:
    """In a file or a pipe nothing says how wide a line may be."""
    console = Console()
    return console if console.is_terminal else Console(width=140)


def digits(number: float | None) -> str:
    return "–" if number is None else f"{number:.4g}"


def bounds(found: Mapping[str, Any]) -> str:
    return "–" if found["low"] is None else f"[{digits(found['low'])}, {digits(found['high'])}]"
