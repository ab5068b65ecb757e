"""One task as two models answered it, compared on the prompts that they share. It reads no file and loads no model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from speckd.evaluation.statistics import Metric, difference
from speckd.evaluation.sums import columns


@dataclass(frozen=True)
class Answered:
    """One task as one model answered it. `lines`: of its examples; of each, `index`, `key` and `scores` count."""

    kind: str
    metrics: Sequence[Metric]
    lines: Sequence[Mapping[str, Any]]


def differences(first: Answered, second: Answered, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Second less first over the shared examples, for every metric of both, with paired intervals.

    Returns:
        rows with `metric`, `of`, `first`, `second`, `difference`, `low`, `high`, `n`; none where the kinds differ, or where no
        example is shared.
    """
    pairs = _pairs(first.lines, second.lines) if first.kind == second.kind else []
    if not pairs:
        return
    having = {metric.name for metric in second.metrics}
    for metric in first.metrics:
        if metric.name in having:
            yield {"metric": metric.name, "of": metric.of, **difference(metric, pairs, seed)}


def _pairs(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> list[tuple[dict[str, float], dict[str, float]]]:
    """By key; where several rows have one, in their order."""
    sides = []
    for lines in (first, second):
        by_key: dict[tuple[str, int], dict[str, float]] = {}
        seen: dict[str, int] = {}
        for (_, key), own in sorted(columns(lines).items()):
            by_key[key, seen.get(key, 0)] = own
            seen[key] = seen.get(key, 0) + 1
        sides.append(by_key)
    return [(own, sides[1][key]) for key, own in sides[0].items() if key in sides[1]]
