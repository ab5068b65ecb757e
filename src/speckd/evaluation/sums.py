"""What the lines of a task's examples add up to, row by row."""

from collections.abc import Mapping, Sequence
from typing import Any


def columns(lines: Sequence[Mapping[str, Any]]) -> dict[tuple[int, str], dict[str, float]]:
    """By row and key, what its answers' scores add up to; `completions`: how many; `examples`: 1.

    Args:
        lines: of a task's examples.
    """
    found: dict[tuple[int, str], dict[str, float]] = {}
    for line in lines:
        own = found.setdefault((line["index"], line["key"]), {"examples": 1.0, "completions": 0.0})
        own["completions"] += 1
        for name, number in _flat(line["scores"]):
            own[name] = own.get(name, 0.0) + number
    return found


def _flat(scores: Mapping[str, Any]) -> list[tuple[str, float]]:
    numbers: list[tuple[str, float]] = []
    for name, score in scores.items():
        if isinstance(score, list):
            numbers += [(f"{name}.{place}", float(one)) for place, one in enumerate(score)]
        elif score is not None:
            numbers.append((name, float(score)))
    return numbers
