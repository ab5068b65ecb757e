"""The page: what was read, put in order for the template. All text goes through `Shown` and Jinja's escaping."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

import speckd
from speckd.evaluation.finished import Evaluation
from speckd.report.answers import tasks_of
from speckd.report.benches import Bench
from speckd.report.charts import Chart, DataTable, Picture, charts
from speckd.report.comparison import MEASURES, Estimate, Group, groups, measured, paired
from speckd.report.runs import Run
from speckd.report.shown import Shown, number, without_secrets
from speckd.report.viewer import views

#: By which a page of ours is known.
GENERATOR = "speckd report"


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
class MadePart:
    """How a run or an evaluation came about: what is missing of it, what was warned of, and names and values."""

    name: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    settings: tuple[tuple[str, str], ...]
    environment: tuple[tuple[str, str], ...]


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
        runs=[(run.name, views(run, place)) for place, run in enumerate(sources.runs)],
        tasks=tasks_of(sources.evaluations),
        made=[*map(_made_of_run, sources.runs), *map(_made_of_evaluation, sources.evaluations)],
        benches=sources.benches,
        uri=DataUri.of,
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


def _made_of_run(run: Run) -> MadePart:
    facts = [
        ("state", "finished" if run.finished else "not finished"),
        ("optimizer steps", number(run.steps)),
        *((str(name), _value(value)) for name, value in run.data.items()),
    ]
    return MadePart(run.name, run.notes, run.warnings, tuple(facts), _pairs(run.settings), _pairs(run.environment))


def _made_of_evaluation(one: Evaluation) -> MadePart:
    both = {**one.model, **{f"teacher: {key}": value for key, value in one.teacher.items()}}
    options = {f"{task.name}: {key}": value for task in one.tasks for key, value in task.options.items() if value is not None}
    settings = (*_pairs(one.settings), *_pairs(options))
    return MadePart(one.name, one.notes, (), _pairs(both), settings, _pairs(one.environment))


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


def figures_of(sources: Sources, shown: Shown) -> list[Chart]:
    return charts(groups(sources.runs), shown)
