"""Evaluations side by side, on the prompts that they share: differences with paired intervals."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from speckd.errors import ConfigError
from speckd.evaluation import paired
from speckd.evaluation.journal import read_lines
from speckd.evaluation.statistics import Metric
from speckd.teachers.manifest import differences

logger = logging.getLogger(__name__)

#: Options that say where, and not what; and how many, which the pairs show.
_PLACES = {"few_shot_data", "limit"}


def compare(folders: Sequence[Path], seed: int = 0) -> list[dict[str, Any]]:
    """Each folder against the first, for every task and metric of both.

    Examples are joined by the digest of their prompts' tokens: where two models cut text differently, none are shared.

    What else differs between two evaluations is said as a warning.

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
    for folder, other in zip(folders[1:], results[1:], strict=True):
        for what in _unlike(results[0], other):
            logger.warning("%s and %s are not alike: %s.", folders[0], folder, what)
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


def _unlike(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[str]:
    """What beside the models differs between two evaluations, in words: their differences may be that one's."""
    own, other = ((each["teacher"] or {}).get("weights") for each in (first, second))
    if own != other:
        yield "their teachers"
    for name in sorted({*first["tasks"]} ^ {*second["tasks"]}):
        yield f"only one has the task {name}"
    for name in sorted({*first["tasks"]} & {*second["tasks"]}):
        yield from differences(_made_with(first["tasks"][name]), _made_with(second["tasks"][name]), f"{name}.")


def _made_with(task: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: value for key, value in task["options"].items() if key not in _PLACES}
    return {**options, "data": task["data"]["sha256"]}


def _rows(
    first: Path, results: Mapping[str, Any], second: Path, others: Mapping[str, Any], seed: int
) -> Iterator[dict[str, Any]]:
    for name, own in results["tasks"].items():
        if name in others["tasks"]:
            sides = _answered(first, name, own), _answered(second, name, others["tasks"][name])
            for row in paired.differences(*sides, seed):
                yield {"task": name, "first_folder": str(first), "second_folder": str(second), **row}


def _answered(folder: Path, name: str, task: Mapping[str, Any]) -> paired.Answered:
    metrics = [
        Metric(metric, tuple(made["columns"]), made["of"], made["statistic"], made.get("k"))
        for metric, made in task["metrics"].items()
    ]
    return paired.Answered(task["kind"], metrics, read_lines(folder / "examples" / f"{name}.jsonl"))


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation.json"
    if not path.is_file():
        raise ConfigError(f"compare: {folder} holds no finished evaluation", "Give folders that speckd evaluate has filled")
    try:
        found = json.loads(path.read_text())
        return {"teacher": found["teacher"], "tasks": dict(found["tasks"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"compare: {path} cannot be read ({error})", "Evaluate anew") from None
