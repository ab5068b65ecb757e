"""Evaluations task by task: metrics, paired differences, counts, and the same prompts side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from speckd.evaluation.alike import unlike_as_a_whole, unlike_in_a_task
from speckd.evaluation.finished import Evaluation, Example, Task
from speckd.evaluation.paired import differences
from speckd.evaluation.statistics import value
from speckd.evaluation.sums import columns
from speckd.report.charts import DataTable
from speckd.report.shown import number

#: Of each task, examples that are shown side by side; letters of one text, and of a heading.
_EXAMPLES, _LETTERS, _HEADING = 5, 2_000, 80


@dataclass(frozen=True)
class Answer:
    """Of one model. `text`: None where the task has no text of the model's own; `scores`: of the row, in words."""

    model: str
    text: str | None
    scores: str


@dataclass(frozen=True)
class SideBySide:
    """One example as several models answered it."""

    heading: str
    prompt: str
    reference: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class TaskPart:
    """One task of some evaluations. `differences`: each model less the first; `notes`: why there is none, and
    what beside the models they may come of."""

    name: str
    metrics: DataTable
    differences: tuple[DataTable, ...]
    notes: tuple[str, ...]
    counts: DataTable
    examples: tuple[SideBySide, ...]


def tasks_of(several: Sequence[Evaluation]) -> list[TaskPart]:
    names = dict.fromkeys(task.name for one in several for task in one.tasks)
    return [_task(name, [(one, task) for one in several for task in [one.task(name)] if task]) for name in names]


def _task(name: str, several: Sequence[tuple[Evaluation, Task]]) -> TaskPart:
    own = [(one.name, task) for one, task in several]
    (first_name, first), *others = own
    gaps, notes = [], []
    for (one, _), (other_name, other) in zip(several[1:], others, strict=True):
        sides = (f"in {first_name}", f"in {other_name}")
        unlike = [*unlike_as_a_whole(several[0][0], one, sides), *unlike_in_a_task(first, other, sides)]
        notes += [f"{other_name} and {first_name} are not alike: {'; '.join(unlike)}."] if unlike else []
        found = _differences(name, (first_name, first), (other_name, other))
        gaps += [found] if found else []
        notes += [] if found else [f"{other_name} and {first_name} share no example: their kinds, data or tokenizers differ."]
    return TaskPart(name, _metrics(name, own), tuple(gaps), tuple(notes), _counts(name, own), tuple(_side_by_side(own)))


def _metrics(name: str, own: Sequence[tuple[str, Task]]) -> DataTable:
    """A row for each metric, a column for each model."""
    rows = []
    for metric in dict.fromkeys(found.metric for _, task in own for found in task.values):
        found = [next((each for each in task.values if each.metric == metric), None) for _, task in own]
        known = [one for one in found if one is not None]
        values = ("–" if one is None else f"{number(one.value)} {_interval(one.low, one.high)}".strip() for one in found)
        counts = ", ".join(dict.fromkeys(number(one.n) for one in known))
        rows.append((metric, *values, counts, "; or ".join(dict.fromkeys(one.of for one in known))))
    return DataTable(f"{name}: metrics", ("metric", *(model for model, _ in own), "examples", "divided by"), tuple(rows))


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"[{number(low)}, {number(high)}]"


def _differences(name: str, first: tuple[str, Task], second: tuple[str, Task]) -> DataTable | None:
    """As `speckd evaluate --compare` has them."""
    rows = []
    for row in differences(first[1].answered, second[1].answered):
        if row["difference"] is not None:
            sign = "+" if row["difference"] > 0 else ""
            gap = f"{sign}{number(row['difference'])} {_interval(row['low'], row['high'])}".strip()
            rows.append((row["metric"], number(row["first"]), number(row["second"]), gap, number(row["n"])))
    head = ("metric", first[0], second[0], "second − first", "shared examples")
    return DataTable(f"{name}: {second[0]} − {first[0]}, paired", head, tuple(rows)) if rows else None


def _counts(name: str, own: Sequence[tuple[str, Task]]) -> DataTable:
    names = list(dict.fromkeys(count for _, task in own for count in task.counts))
    rows = [
        (
            model,
            task.answered.kind,
            *(number(task.counts.get(count)) for count in names),
            str(task.data.get("file", "–")),
            str(task.data.get("rows", "–")),
            str(task.data.get("sha256", "–"))[:12],
        )
        for model, task in own
    ]
    head = ("model", "kind", *(count.replace("_", " ") for count in names), "data", "rows in it", "its SHA-256")
    return DataTable(f"{name}: counts", head, tuple(rows))


def _side_by_side(own: Sequence[tuple[str, Task]]) -> list[SideBySide]:
    """The first examples that all models answered; without such, the first model's own."""
    by_key = [(model, task, _by_key(task), _by_metric(task)) for model, task in own]
    first = by_key[0][2]
    keys = [key for key in first if all(key in examples for _, _, examples, _ in by_key)] or list(first)
    found = []
    for key in keys[:_EXAMPLES]:
        example = first[key][0]
        answers = [
            _answer(model, task, examples[key], scores.get(key, {}))
            for model, task, examples, scores in by_key
            if key in examples
        ]
        begin = " ".join(example.prompt.split())
        heading = f"Row {number(example.row)}: {begin if len(begin) <= _HEADING else begin[:_HEADING].rstrip() + '…'}"
        found.append(SideBySide(heading, _clipped(example.prompt), _clipped(example.reference), tuple(answers)))
    return found


def _by_key(task: Task) -> dict[str, list[Example]]:
    """All answers of the first row that has a key."""
    found: dict[str, list[Example]] = {}
    for example in task.examples:
        own = found.setdefault(example.key, [])
        if not own or own[0].row == example.row:
            own.append(example)
    return found


def _by_metric(task: Task) -> dict[str, dict[str, float]]:
    """Of each key's first row, the metrics that it has by itself."""
    found: dict[str, dict[str, float]] = {}
    for (_, key), sums in columns(task.answered.lines).items():
        if key not in found:
            values = {metric.name: value(metric, [sums]) for metric in task.answered.metrics}
            found[key] = {name: one for name, one in values.items() if one is not None}
    return found


def _answer(model: str, task: Task, examples: Sequence[Example], scores: Mapping[str, float]) -> Answer:
    said = [f"{name} {number(one, 3)}" for name, one in scores.items()]
    said += ["cut off at the longest that is read or written"] if examples[0].truncated else []
    several = f"The first of {len(examples)} answers; of all of them: " if len(examples) > 1 else ""
    text = None if task.answered.kind == "likelihood" else _clipped(examples[0].completion)
    return Answer(model, text, several + ", ".join(said))


def _clipped(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]} … ({len(text) - _LETTERS} more letters)"
