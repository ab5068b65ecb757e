"""A folder that `speckd evaluate` wrote, as data; and two of them compared on the examples that both have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from speckd.report.files import Fields, read_lines, read_object

FILE = "evaluation.json"
_RESAMPLES = 2000


@dataclass(frozen=True)
class Metric:
    """A number with its 95 % interval. `of`: what it divides by, in words; `n`: examples; `columns`: of the examples' scores
    whose sums it divides, numerator and denominator; empty where it is the mean of the score of its own name."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    of: str
    n: int | None
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Example:
    """What a model answered. `reference` is as the data gave it, as text."""

    key: str
    prompt: str
    completion: str
    reference: str
    scores: Mapping[str, float]
    truncated: bool


@dataclass(frozen=True)
class Task:
    """One task of an evaluation. `examples`: by key."""

    name: str
    kind: str
    data: Mapping[str, Any]
    metrics: tuple[Metric, ...]
    counts: Mapping[str, float]
    examples: Mapping[str, Example]


@dataclass(frozen=True)
class Evaluation:
    """One evaluated model. `name`: unique in a report."""

    name: str
    model: Mapping[str, Any]
    teacher: Any
    settings: Mapping[str, Any]
    environment: Mapping[str, Any]
    tasks: tuple[Task, ...]
    notes: tuple[str, ...]

    def task(self, name: str) -> Task | None:
        return next((task for task in self.tasks if task.name == name), None)


@dataclass(frozen=True)
class Difference:
    """Second minus first in a metric, over `n` examples that both answered, with the percentile bootstrap's 95 % interval
    (Efron 1979) over pairs; None where there are fewer than two."""

    value: float
    low: float | None
    high: float | None
    n: int


def is_evaluation(folder: Path) -> bool:
    return (folder / FILE).is_file()


def read_evaluation(folder: Path, name: str) -> Evaluation:
    """Raises DataError where a file is damaged."""
    whole = read_object(folder / FILE)
    given, tasks = whole.object("tasks"), []
    notes: list[str] = []
    for task in given.values:
        found, note = _task(given.object(task), str(task), folder)
        tasks.append(found)
        notes += [note] if note else []
    return Evaluation(
        name,
        whole.maybe_object("model").values,
        whole.values.get("teacher"),
        whole.maybe_object("settings").values,
        whole.maybe_object("environment").values,
        tuple(tasks),
        tuple(notes),
    )


def _task(fields: Fields, name: str, folder: Path) -> tuple[Task, str | None]:
    metrics = fields.object("metrics")
    found = tuple(_metric(metrics.object(metric), str(metric)) for metric in metrics.values)
    examples, note = _examples(folder, name)
    kind = fields.maybe_text("kind") or ""
    counts = fields.maybe_object("counts").numbers()
    return Task(name, kind, fields.maybe_object("data").values, found, counts, examples), note


def _metric(fields: Fields, name: str) -> Metric:
    value, low, high = (fields.maybe_number(key) for key in ("value", "low", "high"))
    columns = tuple(fields.texts("columns")) if fields.values.get("statistic") == "ratio" else ()
    return Metric(name, value, low, high, fields.maybe_text("of") or "", fields.maybe_whole("n"), columns)


def _examples(folder: Path, task: str) -> tuple[dict[str, Example], str | None]:
    path = folder / "examples" / f"{task}.jsonl"
    if path.parent != folder / "examples" or not path.is_file():  # a name is no way out of the folder
        return {}, f"examples/{task}.jsonl is not there: no samples and no paired differences of this task."
    lines, note = read_lines(path)
    return {one.key: one for one in map(_example, lines)}, note


def _example(line: Fields) -> Example:
    key, reference = line.values.get("key"), line.values.get("reference")
    return Example(
        str(line.values.get("index") if key is None else key),
        line.maybe_text("prompt") or "",
        line.maybe_text("completion") or "",
        "" if reference is None else str(reference),
        line.maybe_object("scores").numbers(),
        bool(line.values.get("truncated")),
    )


# ---- paired ----------------------------------------------------------------------------------------------------------------


def difference(metric: Metric, first: Task, second: Task) -> Difference | None:
    """None where no example of both has the metric."""
    columns = metric.columns if len(metric.columns) == 2 else (metric.name,)
    keys = [key for key in first.examples if key in second.examples and _have(columns, first, second, key)]
    if not keys:
        return None
    values = [[task.examples[key].scores[column] for task in (first, second) for column in columns] for key in keys]
    rows = np.array(values, dtype=np.float64)
    if len(columns) == 1:
        rows = np.insert(rows, [1, 2], 1.0, axis=1)
    value = float(_gap(rows))
    if not np.isfinite(value):
        return None
    low, high = _interval(rows)
    return Difference(value, low, high, len(keys))


def _have(columns: Sequence[str], first: Task, second: Task, key: str) -> bool:
    return all(column in task.examples[key].scores for task in (first, second) for column in columns)


def _gap(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """[..., n, 4] numerator and denominator of the first, then of the second -> second minus first, [...]."""
    total = rows.sum(-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(total[..., 2] / total[..., 3] - total[..., 0] / total[..., 1])


def _interval(rows: NDArray[np.float64]) -> tuple[float | None, float | None]:
    if len(rows) < 2:
        return None, None
    found = bootstrap(
        (np.arange(len(rows)),),
        lambda index, axis: _gap(rows[np.moveaxis(np.asarray(index), axis, -1)]),
        n_resamples=_RESAMPLES,
        batch=max(1, 2**20 // len(rows)),
        vectorized=True,
        axis=-1,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    low, high = float(found.low), float(found.high)
    return (low, high) if np.isfinite([low, high]).all() else (None, None)
