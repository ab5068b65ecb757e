"""Evaluations side by side, on the prompts that they share: differences with paired intervals."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from speckd.errors import ConfigError
from speckd.evaluation import paired
from speckd.evaluation.alike import unlike_as_a_whole, unlike_in_a_task
from speckd.evaluation.finished import EXAMPLES, FILE, Evaluation, Task, read_evaluation

logger = logging.getLogger(__name__)

_SIDES = ("in the first", "in the second")


def compare(folders: Sequence[Path], seed: int = 0) -> list[dict[str, Any]]:
    """Each folder against the first, for every task and metric of both.

    Examples are joined by the digest of their prompts' tokens: where two models cut text differently, none are shared.

    What else differs between two evaluations is said as a warning.

    Returns:
        rows with `task`, `metric`, `of`, `first_folder`, `second_folder`, `first`, `second`, `difference`, `low`, `high`, `n`:
        values over the n shared examples alone, and second less first.

    Raises:
        ConfigError: a folder holds no evaluation or lacks a task's examples, or two share nothing, naming it.
        DataError: a file is damaged, was changed or is another version's, naming the place.
    """
    if len(folders) < 2:
        raise ConfigError("compare: two folders or more are compared", "Write --compare OUT_A OUT_B")
    first, *others = [_finished(folder) for folder in folders]
    for other in others:
        for pair in _shared(first, other):
            for one, task in zip((first, other), pair, strict=True):
                _require_examples(one, task)
    for one in (first, *others):
        for note in one.notes:
            logger.warning("%s: %s.", one.name, note.removesuffix("."))
    for other in others:
        for what in _unlike(first, other):
            logger.warning("%s and %s are not alike: %s.", first.name, other.name, what)
    found = []
    for other in others:
        rows = list(_rows(first, other, seed))
        if not rows:
            raise ConfigError(
                f"compare: {first.name} and {other.name} have no example of a task in common",
                "Evaluate both with the same tasks, data and tokenizer",
            )
        found += rows
    return found


def _finished(folder: Path) -> Evaluation:
    if not (folder / FILE).is_file():
        raise ConfigError(f"compare: {folder} holds no finished evaluation", "Give folders that speckd evaluate has filled")
    return read_evaluation(folder, str(folder))


def _shared(first: Evaluation, second: Evaluation) -> Iterator[tuple[Task, Task]]:
    for task in first.tasks:
        other = second.task(task.name)
        if other is not None:
            yield task, other


def _require_examples(one: Evaluation, task: Task) -> None:
    if not task.examples:
        path = Path(one.name) / EXAMPLES / f"{task.name}.jsonl"
        raise ConfigError(f"compare: {path} is missing, or holds no line", "The same speckd evaluate command makes it anew")


def _unlike(first: Evaluation, second: Evaluation) -> Iterator[str]:
    """What beside the models differs between two evaluations, in words: their differences may be that one's."""
    yield from unlike_as_a_whole(first, second, _SIDES)
    for name in sorted({task.name for task in first.tasks} ^ {task.name for task in second.tasks}):
        yield f"only one has the task {name}"
    for task, other in _shared(first, second):
        yield from unlike_in_a_task(task, other, _SIDES)


def _rows(first: Evaluation, second: Evaluation, seed: int) -> Iterator[dict[str, Any]]:
    for task, other in _shared(first, second):
        for row in paired.differences(task.answered, other.answered, seed):
            yield {"task": task.name, "first_folder": first.name, "second_folder": second.name, **row}
