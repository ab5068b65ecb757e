"""What is not alike in two evaluations beside their models, in words."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from speckd.evaluation.finished import Evaluation, Task
from speckd.teachers.manifest import differences

Sides = tuple[str, str]

#: Options that say where, and not what; and how many, which the pairs show.
_PLACES = {"few_shot_data", "limit"}
#: Settings above the tasks that answers depend on, and that no task repeats.
_SETTINGS = ("dtype", "seed")
_DIGEST = re.compile(r"[0-9a-f]{32,64}")


def unlike_as_a_whole(first: Evaluation, second: Evaluation, sides: Sides) -> Iterator[str]:
    """What all tasks share: the differences may be that one's. `sides`: the words for where each stands."""
    if first.teacher.get("weights") != second.teacher.get("weights"):
        yield "their teachers differ"
    own, other = ({key: each.settings[key] for key in _SETTINGS if key in each.settings} for each in (first, second))
    yield from differences(own, other, "settings.", sides)


def unlike_in_a_task(first: Task, second: Task, sides: Sides) -> Iterator[str]:
    """What one task was made with, here and there."""
    yield from differences(_made_with(first), _made_with(second), f"{first.name}.", sides)


def unlike_plans(kept: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    """How another evaluation's `plan.json` and this one's differ; a task that only one has is named, and no more."""
    there, now = (_shortened(dict(plan)) for plan in (kept, wanted))
    tasks, ours = (_mapping(plan.pop("tasks", None)) for plan in (there, now))
    only, missing = (", ".join(sorted(one.keys() - other.keys())) for one, other in ((tasks, ours), (ours, tasks)))
    if only:
        yield f"it has task {only}, not {missing}" if missing else f"it has task {only}, too"
    elif missing:
        yield f"it has no task {missing}"
    if (there.get("teacher") is None) != (now.get("teacher") is None):
        yield "it has no teacher" if there.pop("teacher", None) is None else "it has a teacher"
        there["teacher"] = now["teacher"] = None
    yield from differences(there, now)
    for name in sorted(tasks.keys() & ours.keys()):
        sides = [_mapping(each[name]) for each in (tasks, ours)]
        kinds = [{"kind": side.get("kind")} for side in sides]  # of another kind, all else is other, too
        own, other = sides if kinds[0] == kinds[1] else kinds
        yield from differences(own, other, f"tasks.{name}.")


def _made_with(task: Task) -> dict[str, Any]:
    options = {key: value for key, value in task.options.items() if key not in _PLACES}
    return {**options, "data": task.data.get("sha256")}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shortened(value: Any) -> Any:
    """Digests by their first digits."""
    if isinstance(value, dict):
        return {key: _shortened(one) for key, one in value.items()}
    return value[:12] if isinstance(value, str) and _DIGEST.fullmatch(value) else value
