"""A folder that `speckd evaluate` wrote, as data: what compares evaluations and what reports them read it here."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from speckd.checked_files import Fields, read_lines, read_object
from speckd.errors import DataError
from speckd.evaluation.paired import Answered
from speckd.evaluation.statistics import STATISTICS, Metric

FILE, PLAN, EXAMPLES = "evaluation.json", "plan.json", "examples"
#: How many columns a statistic is of; of the others, an odd number from 3.
_COLUMNS = {"ratio": 2, "median": 1}


@dataclass(frozen=True)
class Value:
    """A metric with its 95 % interval, as the evaluation has them. `of`: what it divides by, in words; `n`: examples."""

    metric: str
    value: float | None
    low: float | None
    high: float | None
    of: str
    n: int | None


@dataclass(frozen=True)
class Example:
    """What a model answered, once. `row`: of the data, from 1; `key`: the same for the same prompt in whatever folder;
    `prompt`, `reference`: as text."""

    row: int
    key: str
    prompt: str
    completion: str
    reference: str
    truncated: bool


@dataclass(frozen=True)
class Task:
    """One task of an evaluation. `data`, `options`, `counts`: as in the file; `examples`: in its order, several of one prompt
    where it was answered several times; `answered`: what metrics are made of."""

    name: str
    data: Mapping[str, Any]
    options: Mapping[str, Any]
    counts: Mapping[str, float]
    values: tuple[Value, ...]
    examples: tuple[Example, ...]
    answered: Answered


@dataclass(frozen=True)
class Evaluation:
    """One evaluated model. `name`: unique among those beside it; `notes`: what is missing or cut off, a line each."""

    name: str
    finished: bool
    model: Mapping[str, Any]
    teacher: Mapping[str, Any]
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    tasks: tuple[Task, ...]
    notes: tuple[str, ...]

    def task(self, name: str) -> Task | None:
        return next((task for task in self.tasks if task.name == name), None)


def is_evaluation(folder: Path) -> bool:
    """Also one that has only begun."""
    return (folder / FILE).is_file() or ((folder / PLAN).is_file() and (folder / EXAMPLES).is_dir())


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """Raises DataError where a file is damaged; of one that has not finished there is a note, and no more."""
    if not (folder / FILE).is_file():
        unfinished = f"This evaluation has not finished: there is no {FILE} yet. The same speckd evaluate command goes on."
        return Evaluation(name, False, {}, {}, {}, {}, (), (unfinished,))
    whole = read_object(folder / FILE)
    given, tasks = whole.object("tasks"), []
    notes: list[str] = []
    for task in given.values:
        found, note = _task(given.object(task), str(task), folder)
        tasks.append(found)
        notes += [note] if note else []
    return Evaluation(
        name,
        True,
        whole.object("model").values,
        whole.maybe_object("teacher").values,
        whole.maybe_object("settings").values,
        whole.maybe_object("environment").values,
        tuple(tasks),
        tuple(notes),
    )


def _task(fields: Fields, name: str, folder: Path) -> tuple[Task, str | None]:
    metrics = fields.object("metrics")
    each = [metrics.object(metric) for metric in metrics.values]
    lines, note = _examples(folder, name)
    answered = Answered(
        fields.text("kind"),
        [_metric(found, str(metric)) for metric, found in zip(metrics.values, each, strict=True)],
        [{"index": line.whole("index"), "key": line.text("key"), "scores": _scores(line.object("scores"))} for line in lines],
    )
    found = Task(
        name,
        fields.maybe_object("data").values,
        fields.maybe_object("options").values,
        fields.maybe_object("counts").numbers(),
        tuple(_value(found, str(metric)) for metric, found in zip(metrics.values, each, strict=True)),
        tuple(map(_example, lines)),
        answered,
    )
    return found, note


def _value(fields: Fields, name: str) -> Value:
    value, low, high = (fields.maybe_number(key) for key in ("value", "low", "high"))
    return Value(name, value, low, high, fields.text("of"), fields.maybe_whole("n"))


def _metric(fields: Fields, name: str) -> Metric:
    statistic, columns = fields.text("statistic"), tuple(fields.texts("columns"))
    known, count = statistic in STATISTICS, len(columns)
    if not known or not (count == _COLUMNS[statistic] if statistic in _COLUMNS else count % 2 and count > 1):
        what = f"a {statistic} of {count} columns" if known else f"statistic is {statistic!r:.60}"
        raise DataError(f"{fields.where}: {what} is unknown to this version of speckd", "Evaluate anew with this version")
    return Metric(name, columns, fields.text("of"), statistic, fields.maybe_whole("k"))


def _examples(folder: Path, task: str) -> tuple[list[Fields], str | None]:
    path = folder / EXAMPLES / f"{task}.jsonl"
    if path.parent != folder / EXAMPLES or not path.is_file():  # a name is no way out of the folder
        return [], f"{EXAMPLES}/{task}.jsonl is not there: no samples and no paired differences of this task."
    return read_lines(path)


def _example(line: Fields) -> Example:
    return Example(
        line.whole("index") + 1,
        line.text("key"),
        _said(line.values.get("prompt")),
        line.maybe_text("completion") or "",
        _said(line.values.get("reference")),
        bool(line.values.get("truncated")),
    )


def _said(value: Any) -> str:
    """Messages as text, one below the other."""
    if isinstance(value, list):
        turns = (one if isinstance(one, dict) else {"content": one} for one in value)
        return "\n\n".join(f"{turn.get('role', '')}: {turn.get('content', '')}" for turn in turns)
    return "" if value is None else str(value)


def _scores(fields: Fields) -> dict[str, float | list[float]]:
    """Numbers, and lists of them; without those that are not there."""
    known = {str(key): value for key, value in fields.values.items() if value is not None}
    for key, value in known.items():
        if not all(isinstance(one, (bool, int, float)) for one in _each(value)):
            raise DataError(f"{fields.where}: {key} is {value!r:.60}", "It must be a number: was the file changed?")
    return {key: [float(one) for one in value] if isinstance(value, list) else float(value) for key, value in known.items()}


def _each(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]
