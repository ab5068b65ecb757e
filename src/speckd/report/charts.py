"""Charts of runs: a PNG in light and in dark, a sentence with the numbers for who does not see it, and the table behind it."""

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from speckd.report.comparison import Group
from speckd.report.runs import Run, range_label
from speckd.report.shown import Shown, number

#: Okabe and Ito's colours, told apart by the colour-blind; the lighter ones stand on dark.
_DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)), (0, (7, 2)))
_MARKERS = "osD^vPX*"
_ON_LIGHT = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7F7F7F", "#8C6BB1")
_ON_DARK = ("#56B4E9", "#F0955A", "#2BC49A", "#DE9CC0", "#0F8FD6", "#E8B84A", "#A0A0A0", "#B39AD4")
_NAME = 44
#: Rows of a table; panels of one picture.
_MOST_ROWS, _MOST_PANELS = 40, 6
#: Lines of which an alternative text speaks.
_SAID = 8


@dataclass(frozen=True)
class Colours:
    """Of a picture: text, quieter text, rules, the ground, and the lines in their order."""

    ink: str
    quiet: str
    grid: str
    ground: str
    lines: tuple[str, ...]


_LIGHT = Colours("#1f2328", "#59636e", "#e4e7eb", "#ffffff", _ON_LIGHT)
_DARK = Colours("#e6e8eb", "#a3adb8", "#333a42", "#181b1f", _ON_DARK)


@dataclass(frozen=True)
class DataTable:
    """Cells as text, the first column naming its row."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Picture:
    """One set of axes as PNGs. `file`: its name in the report's folder; `alt`: what it shows, in words and numbers."""

    file: str
    alt: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class Chart:
    """Pictures of one thing, and the numbers behind them. `note`: what is divided by what."""

    title: str
    note: str
    pictures: tuple[Picture, ...]
    table: DataTable


@dataclass(frozen=True)
class Line:
    """A curve, or points where `x` are places of names. `style`: the number of its colour; `band`: the lowest and the highest
    run at each x, where it is a mean."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    style: int
    band: tuple[tuple[float, ...], tuple[float, ...]] | None = None


@dataclass(frozen=True)
class Panel:
    """One set of axes. `ticks`: names of the places 0, 1, … on x; None: x is a number. `joined`: x has an order."""

    title: str
    x_name: str
    y_name: str
    lines: tuple[Line, ...]
    ticks: tuple[str, ...] | None = None
    rate: bool = False
    joined: bool = True


def charts(several: Sequence[Group], shown: Shown) -> list[Chart]:
    """All that the runs have numbers for."""
    made = (_loss, _tar, _divergence, _by_position, _by_entropy, _by_task)
    return [chart for make in made for chart in [make(several, shown)] if chart is not None]


# ---- what is shown ---------------------------------------------------------------------------------------------------------


def _loss(several: Sequence[Group], shown: Shown) -> Chart | None:
    panels = (
        Panel("training batches", "optimizer step", "loss (nats a token)", _curves(several, "loss")),
        Panel("held out", "optimizer step", "loss (nats a token)", _curves(several, "eval_loss")),
    )
    note = (
        "The objective's own loss: its sum over supervised tokens, divided by what the normalizer says; training: mean over "
        "the steps since the line before. Objectives that weigh tokens differently are not to be compared by it."
    )
    return _chart("loss", "Loss", note, panels, shown)


def _tar(several: Sequence[Group], shown: Shown) -> Chart | None:
    panels = (
        Panel("training batches, the run’s own gate", "optimizer step", "TAR", _curves(several, "tar"), rate=True),
        Panel("held out, Top-5 rule for all", "optimizer step", "TAR", _curves(several, "eval_tar"), rate=True),
    )
    note = (
        "TAR: the mean over sequences of the accepted fraction of their supervised tokens. A gate that accepts all has 1 in "
        "training; the held-out rule is the same for every run."
    )
    return _chart("tar", "Token acceptance rate", note, panels, shown)


#: With the number of its style; the last one lies behind the others.
_OUTCOMES = {
    "divergence": ("all where computed", 6),
    "divergence_accepted": ("accepted", 0),
    "divergence_rejected": ("rejected", 1),
}


def _divergence(several: Sequence[Group], shown: Shown) -> Chart | None:
    panels = []
    for group in several[:_MOST_PANELS]:
        lines = [
            _curve(name, group.runs, key, style)
            for key, (name, style) in _OUTCOMES.items()
            if any(run.series(key)[0] for run in group.runs)
        ]
        panels.append(Panel(group.name, "optimizer step", "divergence (nats a token)", tuple(lines)))
    left = f" The first {_MOST_PANELS} methods only." if len(several) > _MOST_PANELS else ""
    note = (
        "The objective's divergence before any weight, per supervised token where it was computed (a masked token's is not), "
        f"weighted by acceptance and by its complement; mean over the runs of a method.{left}"
    )
    return _chart("divergence", "Divergence by outcome", note, panels, shown)


def _by_position(several: Sequence[Group], shown: Shown) -> Chart | None:
    return _by_range(
        several,
        shown,
        "tar_by_position",
        "TAR by position",
        "place among the sample's supervised tokens, from 0",
        "Accepted share of the supervised tokens at these places",
    )


def _by_entropy(several: Sequence[Group], shown: Shown) -> Chart | None:
    return _by_range(
        several,
        shown,
        "tar_by_teacher_entropy",
        "TAR by the teacher's entropy",
        "the teacher's entropy (nats)",
        "Accepted share of the tokens whose entropy was measured (one in 32, picked by who they are)",
    )


def _by_range(several: Sequence[Group], shown: Shown, prefix: str, title: str, x_name: str, note: str) -> Chart | None:
    """Means over the last quarter of the logged windows."""
    keys = list(
        dict.fromkeys(
            key for g in several for run in g.runs for entry in run.log for key in entry if key.startswith(f"{prefix}/")
        )
    )
    keys.sort(key=lambda key: float(key.split("/")[1].split("_")[0]) if range_label(key) != key else math.inf)
    lines = []
    for style, group in enumerate(several):
        found = {place: _late(group.runs, key) for place, key in enumerate(keys)}
        known = {place: value for place, value in found.items() if value is not None}
        if known:
            lines.append(Line(group.name, tuple(map(float, known)), tuple(known.values()), style))
    panel = Panel("training batches, the run’s own gate", x_name, "TAR", tuple(lines), tuple(map(range_label, keys)), rate=True)
    note += "; mean over the windows in the last quarter of the log, and over a method's runs."
    return _chart(prefix.replace("_", "-"), title, note, (panel,), shown)


def _late(runs: Sequence[Run], key: str) -> float | None:
    values = []
    for run in runs:
        _, logged = run.series(key)
        values += logged[-max(1, len(logged) // 4) :]
    return sum(values) / len(values) if values else None


def _by_task(several: Sequence[Group], shown: Shown) -> Chart | None:
    panels = []
    for measure, name, rate in (("tar", "TAR, Top-5 rule", True), ("kl", "KL(teacher ‖ student), nats a token", False)):
        tasks = sorted({one.task for group in several for run in group.runs for one in run.by_task if measure in one.measures})
        lines = []
        for style, group in enumerate(several):
            found = {place: _last_of_task(group.runs, task, measure) for place, task in enumerate(tasks)}
            known = {place: value for place, value in found.items() if value is not None}
            if known:
                lines.append(Line(group.name, tuple(map(float, known)), tuple(known.values()), style))
        panels.append(Panel("held out, after training", "task", name, tuple(lines), tuple(tasks), rate, joined=False))
    note = "Held-out sequences (TAR) and supervised tokens (KL) of each task; mean over a method's runs."
    return _chart("by-task", "By task", note, panels, shown)


def _last_of_task(runs: Sequence[Run], task: str, measure: str) -> float | None:
    values = []
    for run in runs:
        own = [one for one in run.by_task if one.task == task and measure in one.measures]
        if own:
            values.append(max(own, key=lambda one: one.step).measures[measure])
    return sum(values) / len(values) if values else None


# ---- curves ----------------------------------------------------------------------------------------------------------------


def _curves(several: Sequence[Group], key: str) -> tuple[Line, ...]:
    """One a method: the mean over its runs."""
    found = [_curve(group.name, group.runs, key, style) for style, group in enumerate(several)]
    return tuple(line for line in found if line.x)


def _curve(name: str, runs: Sequence[Run], key: str, style: int) -> Line:
    """At each step, over the runs that logged it."""
    at: dict[float, list[float]] = {}
    for run in runs:
        for step, value in zip(*run.series(key), strict=True):
            at.setdefault(step, []).append(value)
    steps = sorted(at)
    band = (tuple(min(at[step]) for step in steps), tuple(max(at[step]) for step in steps)) if len(runs) > 1 else None
    return Line(name, tuple(steps), tuple(sum(at[step]) / len(at[step]) for step in steps), style, band)


# ---- one chart -------------------------------------------------------------------------------------------------------------


def _chart(file: str, title: str, note: str, panels: Sequence[Panel], shown: Shown) -> Chart | None:
    panels = [panel for panel in panels if panel.lines]
    if not panels:
        return None
    pictures = []
    for place, panel in enumerate(panels, 1):
        light, dark = (_drawn(panel, colours, shown) for colours in (_LIGHT, _DARK))
        pictures.append(Picture(f"{file}-{place}.png" if len(panels) > 1 else f"{file}.png", _said(title, panel), light, dark))
    return Chart(title, note, tuple(pictures), _table(title, panels))


def _said(title: str, panel: Panel) -> str:
    lines = [_said_of(panel, line) for line in panel.lines[:_SAID]]
    more = f"; and {len(panel.lines) - _SAID} more" if len(panel.lines) > _SAID else ""
    return f"{title}, {panel.title} ({panel.y_name}): {'; '.join(lines)}{more}."


def _said_of(panel: Panel, line: Line) -> str:
    if panel.ticks is not None:
        pairs = zip(line.x, line.y, strict=True)
        return f"{line.name}: " + ", ".join(f"{panel.ticks[int(x)]}: {number(y, 3)}" for x, y in pairs)
    if len(line.x) == 1:
        return f"{line.name}: {number(line.y[0], 3)} at step {number(line.x[0])}"
    first, last = (f"{number(line.y[end], 3)} at step {number(line.x[end])}" for end in (0, -1))
    return f"{line.name}: from {first} to {last}"


def _table(title: str, panels: Sequence[Panel]) -> DataTable:
    """A row for each x, a column for each line; of long curves, rows at equal distances, the last among them."""
    several = len(panels) > 1
    columns = [(panel, line) for panel in panels for line in panel.lines]
    heads = [
        f"{line.name}, {panel.title}, {panel.y_name}" if several else f"{line.name}, {panel.y_name}" for panel, line in columns
    ]
    places = sorted({x for _, line in columns for x in line.x})
    kept = places
    if len(places) > _MOST_ROWS:
        kept = [places[round(i * (len(places) - 1) / (_MOST_ROWS - 1))] for i in range(_MOST_ROWS)]
    ticks = panels[0].ticks
    values = [dict(zip(line.x, line.y, strict=True)) for _, line in columns]
    rows = [(number(x) if ticks is None else ticks[int(x)], *(number(one.get(x), 5) for one in values)) for x in kept]
    left = f" ({len(kept)} of {len(places)} points)" if len(kept) < len(places) else ""
    return DataTable(f"{title}: the numbers{left}", (panels[0].x_name, *heads), tuple(rows))


def _drawn(panel: Panel, colours: Colours, shown: Shown) -> bytes:
    settings: dict[str, Any] = {
        "text.parse_math": False,  # a name with dollar signs is a name
        "font.family": "DejaVu Sans",
        "font.size": 9,
        "text.color": colours.ink,
        "axes.labelcolor": colours.quiet,
        "axes.edgecolor": colours.grid,
        "xtick.color": colours.quiet,
        "ytick.color": colours.quiet,
        "grid.color": colours.grid,
        "axes.axisbelow": True,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a letter that the font lacks is drawn as a box
        named = len(panel.lines) > 1
        figure = Figure(figsize=(5.2, 3.3 + (0.17 * -(-len(panel.lines) // 2) if named else 0)), dpi=180)
        FigureCanvasAgg(figure)
        figure.set_facecolor(colours.ground)
        figure.set_layout_engine("constrained")
        axes = figure.add_subplot()
        _draw_panel(axes, panel, colours, shown)
        if named:
            _draw_legend(figure, axes, panel, shown)
        out = io.BytesIO()
        figure.savefig(out, format="png", facecolor=colours.ground, metadata={"Software": None})
    return out.getvalue()


def _draw_panel(axes: Any, panel: Panel, colours: Colours, shown: Shown) -> None:
    axes.set_facecolor(colours.ground)
    for line in panel.lines:
        colour = colours.lines[line.style % len(colours.lines)]
        if line.band is not None:
            axes.fill_between(line.x, *line.band, color=colour, alpha=0.18, linewidth=0)
        points = panel.ticks is not None or len(line.x) < 12
        axes.plot(
            line.x,
            line.y,
            color=colour,
            linestyle=_DASHES[line.style % len(_DASHES)] if panel.joined else "",
            linewidth=1.6,
            marker=_MARKERS[line.style % len(_MARKERS)] if points else None,
            markersize=4 if panel.joined else 6,
        )
    axes.set_title(_short(panel.title, shown), fontsize=9, loc="left", color=colours.ink)
    axes.set_xlabel(panel.x_name)
    axes.set_ylabel(panel.y_name)
    axes.grid(visible=True, axis="y", linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(length=0)
    if panel.rate:
        axes.set_ylim(-0.02, 1.02)
    if panel.ticks is not None:
        long = max(map(len, panel.ticks), default=0) * len(panel.ticks) > 60
        names = [_short(name, shown) for name in panel.ticks]
        axes.set_xticks(range(len(panel.ticks)), names, rotation=30 if long else 0, ha="right" if long else "center")
        axes.set_xlim(-0.4, len(panel.ticks) - 0.6)


def _draw_legend(figure: Figure, axes: Any, panel: Panel, shown: Shown) -> None:
    # A name that begins with an underscore would be left out.
    names = [f" {_short(line.name, shown)}" for line in panel.lines]
    columns = 3 if max(map(len, names)) < 20 else 2 if max(map(len, names)) < 32 else 1
    figure.legend(axes.get_lines(), names, loc="outside lower center", ncols=columns, frameon=False, handlelength=2.6)


def _short(name: str, shown: Shown) -> str:
    text = shown(name).replace("\n", " ").replace("\t", " ")
    return text if len(text) <= _NAME else f"{text[: _NAME - 1]}…"
