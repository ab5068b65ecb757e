"""Evaluations side by side, on the prompts that they share: differences with paired intervals."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speckd.errors import ConfigError
from speckd.evaluation.items import columns
from speckd.evaluation.journal import read_lines
from speckd.evaluation.statistics import Metric, difference


def compare(folders: Sequence[Path], seed: int = 0) -> list[dict[str, Any]]:
    """Each folder against the first, for every task and metric of both.

    Examples are joined by the digest of their prompts' tokens: where two models cut text differently, none are shared.

    Returns:
        rows with `task`, `metric`, `of`, `first_folder`, `second_folder`, `first`, `second`, `difference`, `low`, `high`, `n`:
        values over the n shared examples alone, and second less first.

    Raises:
        ConfigError: a folder holds no evaluation, or two share nothing, naming it.
        StoreError: a file is damaged.
    """
    if len(folders) < 2:
        raise ConfigError("compare: two folders or more are compared", "Write --compare OUT_A OUT_B")
    results = [_results(folder) for folder in folders]
    found = []
    for folder, other in zip(folders[1:], results[1:], strict=True):
        rows = list(_rows(folders[0], results[0], folder, other, seed))
        if not rows:
            raise ConfigError(
                f"compare: {folders[0]} and {folder} have no example of a task in common",
                "Evaluate both with the same tasks, data and tokenizer",
            )
        found += rows
    return found


def _rows(
    first: Path, results: Mapping[str, Any], second: Path, others: Mapping[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    for name, own in results["tasks"].items():
        other = others["tasks"].get(name)
        if other is None or other["kind"] != own["kind"]:
            continue
        pairs = _pairs(first, second, name)
        for metric, made in own["metrics"].items():
            if not pairs or metric not in other["metrics"]:
                continue
            spec = Metric(metric, tuple(made["columns"]), made["of"], made["statistic"], made.get("k"))
            yield {
                "task": name,
                "metric": metric,
                "of": made["of"],
                "first_folder": str(first),
                "second_folder": str(second),
                **difference(spec, pairs, seed),
            }


def _pairs(first: Path, second: Path, task: str) -> list[tuple[dict[str, float], dict[str, float]]]:
    """By key; where several rows have one, in their order."""
    sides = []
    for folder in (first, second):
        by_key: dict[tuple[str, int], dict[str, float]] = {}
        seen: dict[str, int] = {}
        for (_, key), own in sorted(columns(read_lines(folder / "examples" / f"{task}.jsonl")).items()):
            by_key[key, seen.get(key, 0)] = own
            seen[key] = seen.get(key, 0) + 1
        sides.append(by_key)
    return [(own, sides[1][key]) for key, own in sides[0].items() if key in sides[1]]


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    if not path.is_file():
        raise ConfigError(f"compare: {folder} holds no finished evaluation", "Give folders that speckd evaluate has filled")
    try:
        found = json.loads(path.read_text())
        return {"tasks": dict(found["tasks"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"compare: {path} cannot be read ({error})", "Evaluate anew") from None
