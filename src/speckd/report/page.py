"""The page: what was read, put in order for the template. All text goes through `Shown` and Jinja's escaping."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

import speckd
from speckd.report.benches import Bench
from speckd.report.charts import Chart, DataTable, Picture, charts
from speckd.report.comparison import MEASURES, Estimate, Group, groups, measured, paired
from speckd.report.evaluations import Difference, Evaluation, Metric, Task, difference
from speckd.report.runs import Run
from speckd.report.shown import Shown, number, without_secrets
from speckd.report.viewer import View, views

#: By which a page of ours is known.
GENERATOR = "speckd report"
#: Of each task, examples that are shown side by side; letters of one text.
_EXAMPLES, _LETTERS = 5, 2_000


class DataUri(str):
    """A picture's bytes in the page; made here, and nothing else is."""

    __slots__ = ()

    @classmethod
    def of(cls, png: bytes) -> "DataUri":
        return cls(f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}")


@dataclass(frozen=True)
class Sources:
    """All that a report is made of, in the order in which it was given."""

    runs: tuple[Run, ...] = ()
    evaluations: tuple[Evaluation, ...] = ()
    benches: tuple[Bench, ...] = ()


@dataclass(frozen=True)
class Figure:
    """A chart as the template takes it: (picture, light, dark)."""

    chart: Chart
    pictures: tuple[tuple[Picture, DataUri, DataUri], ...]


@dataclass(frozen=True)
class RunPart:
    """One run: `facts` in short, its `settings`, and its samples token by token."""

    run: Run
    facts: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]
    views: tuple[View, ...]


@dataclass(frozen=True)
class SideBySide:
    """One example as several models answered it: (model, completion, scores)."""

    key: str
    prompt: str
    reference: str
    answers: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class TaskPart:
    """One task of some evaluations."""

    name: str
    kind: str
    metrics: DataTable
    differences: DataTable | None
    examples: tuple[SideBySide, ...]


def template(shown: Shown) -> Template:
    """The page's, in which `shown` cleans every text before it is escaped."""
    environment = Environment(
        loader=PackageLoader("speckd.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: _finalized(value, shown),
    )
    return environment.get_template("page.html.j2")


def render(page: Template, sources: Sources, figures: Sequence[Chart]) -> str:
    """The whole page."""
    several = groups(sources.runs)
    return page.render(
        generator=f"{GENERATOR} {speckd.__version__}",
        title=_title(sources),
        figures=[_figure(chart) for chart in figures],
        held_out=_held_out(several),
        changes=_changes(several),
        by_task=_by_task(several),
        differing=_differing(sources.runs),
        runs=[_run_part(run, place) for place, run in enumerate(sources.runs)],
        tasks=_tasks(sources.evaluations),
        evaluations=[_evaluation_facts(one) for one in sources.evaluations],
        benches=[(one, [(picture, DataUri.of(picture.png)) for picture in one.pictures]) for one in sources.benches],
    )


def _figure(chart: Chart) -> Figure:
    return Figure(chart, tuple((one, DataUri.of(one.light), DataUri.of(one.dark)) for one in chart.pictures))


def _finalized(value: Any, shown: Shown) -> Any:
    """What every expression of a template comes to, before it is escaped: a macro's result and our own pictures pass."""
    if isinstance(value, (Markup, DataUri)):
        return value
    return "" if value is None else shown(str(value))


def _title(sources: Sources) -> str:
    names = [*(r.name for r in sources.runs), *(e.name for e in sources.evaluations), *(b.name for b in sources.benches)]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


# ---- runs ------------------------------------------------------------------------------------------------------------------


def _held_out(several: Sequence[Group]) -> DataTable | None:
    """At the end, a row for each method; of a single run, the start above it."""
    columns = measured(several)
    if not columns:
        return None
    rows = []
    for group in several:
        if len(group.runs) == 1 and group.runs[0].start:
            rows.append((f"{group.name}, before", "1", *(number(group.runs[0].start.get(name)) for name in columns)))
        after = "" if len(several) > 1 and len(group.runs) > 1 else ", after"
        values = (_estimate(group.values(name)) for name in columns)
        rows.append((f"{group.name}{after}", number(len(group.runs)), *values))
    return DataTable("Held out", ("method", "runs", *(MEASURES[name] for name in columns)), tuple(rows))


def _changes(several: Sequence[Group]) -> DataTable | None:
    """Each method minus the first, by seed."""
    columns = measured(several)
    rows = []
    for group in several[1:]:
        found = [paired(several[0], group, name) for name in columns]
        if any(found):
            n = max(one.n for one in found if one is not None)
            rows.append((f"{group.name} − {several[0].name}", number(n), *map(_signed, found)))
    return (
        DataTable("Differences, by seed", ("methods", "pairs", *(MEASURES[name] for name in columns)), tuple(rows))
        if rows
        else None
    )


def _estimate(values: Sequence[float]) -> str:
    return str(Estimate.of(values)) if values else "–"


def _signed(found: Estimate | None) -> str:
    return "–" if found is None else f"{'+' if found.mean > 0 else ''}{found}"


def _by_task(several: Sequence[Group]) -> DataTable | None:
    """Of each method, every task before and after."""
    rows = []
    names = [n for n in MEASURES if any(n in one.measures for group in several for run in group.runs for one in run.by_task)]
    for group in several:
        at: dict[tuple[str, int], list[Mapping[str, float]]] = {}
        for one in (one for run in group.runs for one in run.by_task):
            at.setdefault((one.task, one.step), []).append(one.measures)
        for (task, step), found in sorted(at.items()):
            values = (_estimate([each[n] for each in found if n in each]) for n in names)
            counts = [number(found[0].get(name)) for name in ("sequences", "tokens")]
            rows.append((f"{group.name}: {task}", number(step), number(len(found)), *counts, *values))
    head = ("method and task", "step", "runs", "sequences", "tokens", *(MEASURES[name] for name in names))
    return DataTable("Held out, by task", head, tuple(rows)) if rows else None


def _differing(runs: Sequence[Run]) -> DataTable | None:
    """Settings in which the runs are not alike."""
    shown = [{key: _value(value) for key, value in without_secrets(run.settings).items()} for run in runs]
    keys = sorted({key for one in shown for key in one if any(other.get(key) != one[key] for other in shown)})
    rows = [(run.name, *(one.get(key, "–") for key in keys)) for run, one in zip(runs, shown, strict=True)]
    return DataTable("Settings that differ", ("run", *keys), tuple(rows)) if keys else None


def _run_part(run: Run, place: int) -> RunPart:
    facts = [
        ("state", "finished" if run.finished else "not finished"),
        ("optimizer steps", number(run.steps)),
        *((str(name), _value(value)) for name, value in run.data.items()),
    ]
    return RunPart(run, tuple(facts), _pairs(run.settings), _pairs(run.environment), tuple(views(run, place)))


def _pairs(values: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Names and values as text, no secret among them."""
    return tuple(
        (str(key), _value(value)) for key, value in sorted(without_secrets(values).items(), key=lambda pair: str(pair[0]))
    )


def _value(value: Any) -> str:
    if isinstance(value, (Mapping, list, tuple)):
        plain = without_secrets(value)
        return yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=10_000).strip()
    return {None: "null", True: "true", False: "false"}[value] if value is None or isinstance(value, bool) else str(value)


# ---- evaluations -----------------------------------------------------------------------------------------------------------


def _evaluation_facts(one: Evaluation) -> RunPart:
    teacher = {} if one.teacher is None else {"teacher": one.teacher}
    empty = Run(one.name, True, (), {}, {}, 0, {}, {}, {}, (), (), (), one.notes)
    return RunPart(empty, _pairs({**one.model, **teacher}), _pairs(one.settings), _pairs(one.environment), ())


def _tasks(several: Sequence[Evaluation]) -> list[TaskPart]:
    names = dict.fromkeys(task.name for one in several for task in one.tasks)
    return [_task(name, [(one.name, task) for one in several for task in [one.task(name)] if task]) for name in names]


def _task(name: str, own: Sequence[tuple[str, Task]]) -> TaskPart:
    metrics = list(dict.fromkeys(metric.name for _, task in own for metric in task.metrics))
    rows = []
    for metric in metrics:
        for model, task in own:
            found = next((each for each in task.metrics if each.name == metric), None)
            if found is not None:
                rows.append((f"{metric}: {model}", number(found.value), _interval(found), number(found.n), found.of))
    table = DataTable(f"{name}: metrics", ("metric and model", "value", "95 % interval", "examples", "divided by"), tuple(rows))
    return TaskPart(name, own[0][1].kind, table, _differences(name, own), tuple(_side_by_side(own)))


def _interval(found: Metric | Difference) -> str:
    return "–" if found.low is None or found.high is None else f"[{number(found.low)}, {number(found.high)}]"


def _differences(name: str, own: Sequence[tuple[str, Task]]) -> DataTable | None:
    rows = []
    (first_name, first), *others = own
    for metric in first.metrics:
        for other_name, other in others:
            found = difference(metric, first, other)
            if found is not None:
                sign = "+" if found.value > 0 else ""
                value = f"{sign}{number(found.value, 3)}"
                rows.append((f"{metric.name}: {other_name} − {first_name}", value, _interval(found), number(found.n)))
    head = ("metric and models", "difference", "95 % interval", "shared examples")
    return DataTable(f"{name}: paired differences", head, tuple(rows)) if rows else None


def _side_by_side(own: Sequence[tuple[str, Task]]) -> list[SideBySide]:
    """The first examples that all models answered; without such, the first model's own."""
    keys = [key for key in own[0][1].examples if all(key in task.examples for _, task in own)] or list(own[0][1].examples)
    found = []
    for key in keys[:_EXAMPLES]:
        known = [(model, task.examples[key]) for model, task in own if key in task.examples]
        answers = [(model, _clipped(one.completion), _scores(one.scores, one.truncated)) for model, one in known]
        found.append(SideBySide(key, _clipped(known[0][1].prompt), _clipped(known[0][1].reference), tuple(answers)))
    return found


def _scores(scores: Mapping[str, float], truncated: bool) -> str:
    said = [f"{name} {number(value, 3)}" for name, value in scores.items()]
    return ", ".join([*said, *(["cut off at its longest"] if truncated else [])])


def _clipped(text: str) -> str:
    return text if len(text) <= _LETTERS else f"{text[:_LETTERS]} … ({len(text) - _LETTERS} more letters)"


def figures_of(sources: Sources, shown: Shown) -> list[Chart]:
    return charts(groups(sources.runs), shown)
