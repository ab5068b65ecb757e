"""Dose and response, and the front between the two aims."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from textwrap import wrap
from typing import Any

from speckd.bench.plan import Block, Cell, Plan, file_name
from speckd.bench.runner import Found
from speckd.bench.tables import MEASURES, Results
from speckd.over_seeds import interval

_DOSED = ("nll", "accuracy", "kl", "alpha", "tau")
_MARKS = "osD^vPX*<>hdp8"


def draw_all(plan: Plan, found: Sequence[Found], folder: Path) -> None:
    """`dose-BLOCK.png` where a block scrambles its teacher by several shares, `front-BLOCK.png` for every block."""
    import matplotlib

    matplotlib.use("Agg")
    results = Results(plan, found)
    there = {cell.block for cell, _ in results.groups()}
    for block in plan.blocks:
        if block.name not in there:  # every run failed
            continue
        doses = {name: plan.teachers[name].scrambled for name in block.teachers if _only_scrambled(plan, name)}
        if len(set(doses.values())) > 2:
            _draw_doses(results, block, doses, folder / f"dose-{file_name(block.name)}.png")
        _draw_front(results, block, folder / f"front-{file_name(block.name)}.png")


def _only_scrambled(plan: Plan, name: str) -> bool:
    teacher = plan.teachers[name]
    return teacher.base == type(teacher)() and teacher.top_k is None


def _style(methods: Sequence[str], method: str) -> dict[str, Any]:
    """One colour and mark for each of a block's methods."""
    import matplotlib.pyplot as plt

    place = list(methods).index(method)
    return {
        "color": plt.colormaps["tab20"]((2 * place + 2 * place // 20) % 20),
        "marker": _MARKS[place % len(_MARKS)],
        "label": _plain(f" {method}" if method.startswith("_") else method),  # which no legend would show
    }


def _plain(name: str) -> str:
    """A name of the user's, in which a dollar sign begins no formula."""
    return name.replace("$", r"\$")


def _draw_doses(results: Results, block: Block, doses: dict[str, float], path: Path) -> None:
    """Each method minus the one that asks no teacher, which no dose changes."""
    import matplotlib.pyplot as plt

    groups = [(cell, cells) for cell, cells in results.groups() if cell.block == block.name and cell.teacher in doses]
    kinds = list(dict.fromkeys((cell.start, cell.data) for cell, _ in groups))
    size = (3.1 * len(_DOSED), 2.9 * len(kinds) + 1.2)
    figure, axes = plt.subplots(len(kinds), len(_DOSED), figsize=size, squeeze=False, layout="constrained", sharex=True)
    methods = results.plan.methods
    base = next((name for name in block.methods if not (methods[name].needs_teacher or methods[name].untrained)), None)
    for line, kind in zip(axes, kinds, strict=True):
        own = [(doses[cell.teacher], cells) for cell, cells in groups if (cell.start, cell.data) == kind]
        for axis, measure in zip(line, _DOSED, strict=True):
            _draw_curves(axis, results, block.methods, base, measure, own)
        line[0].set_ylabel(_plain("start: {}, {}".format(*kind)))
    for axis in axes[-1]:
        axis.set_xlabel("% of positions scrambled")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_curves(
    axis: Any,
    results: Results,
    methods: Sequence[str],
    base: str | None,
    measure: str,
    doses: Sequence[tuple[float, list[Cell]]],
) -> None:
    """One measure; the methods side by side at each dose, so that their 95 % intervals can be told apart."""
    sizes: list[float] = []
    for place, method in enumerate(name for name in methods if name != base):
        points = sorted((dose, *_gap(results, cells, method, base, measure)) for dose, cells in doses if _has(cells, method))
        if not points:
            continue
        x, y, half = zip(*points, strict=True)
        sizes += [abs(v) for v in y if not math.isnan(v)]
        shifted = [100 * v + 0.7 * (place - len(methods) / 2) for v in x]
        axis.errorbar(shifted, y, yerr=half, capsize=2, linewidth=1, markersize=4, **_style(methods, method))
    name, more = MEASURES[measure]
    if base is not None and sizes:
        axis.axhline(0, color="black", linewidth=0.8)
        if max(sizes) > 10 * median(sizes):  # one method is far off, and would flatten all others
            axis.set_yscale("symlog", linthresh=max(sizes) / 20)
    axis.set_title(f"{name}{f' − {_plain(base)}' if base else ''} ({'up' if more else 'down'} is better)", fontsize=9)
    axis.grid(alpha=0.3)


def _has(cells: Sequence[Cell], method: str) -> bool:
    return any(cell.method == method for cell in cells)


def _gap(results: Results, cells: Sequence[Cell], method: str, base: str | None, measure: str) -> tuple[float, float]:
    """The method's mean and half of its interval: of the paired difference where there is something to subtract."""
    if base is not None and _has(cells, base):
        found = results.against(cells, base, measure).get(method)
        return (math.nan, math.nan) if found is None else (found.mean, found.high - found.mean)
    own = next(cell for cell in cells if cell.method == method)
    return interval(list(results.values(own, measure).values()))


def _draw_front(results: Results, block: Block, path: Path) -> None:
    """NLL against α, one panel a cell: up and to the left is better at both aims."""
    import matplotlib.pyplot as plt

    groups = [(cell, cells) for cell, cells in results.groups() if cell.block == block.name]
    methods = [name for name in results.plan.methods if any(_has(cells, name) for _, cells in groups)]
    columns = min(4, len(groups))
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(3.6 * columns, 3.1 * lines + 1), squeeze=False, layout="constrained")
    flat = axes.flatten()
    for axis, (cell, cells) in zip(flat, groups, strict=False):
        points = {own: (_centre(results, own, "nll"), _centre(results, own, "alpha")) for own in cells}
        for own, (x, y) in points.items():
            axis.plot(x, y, linestyle="", markersize=7, **_style(methods, own.method))
        front = front_of(list(points.values()))
        axis.plot(*zip(*front, strict=True), color="gray", linewidth=0.8, zorder=0)
        far = _look_near(axis, points)
        left_out = wrap(f"not in the picture: {', '.join(far)}", 45) if far else []
        title = [f"{cell.start}, {cell.teacher}, {cell.data}", *left_out]
        axis.set_title(_plain("\n".join(title)), fontsize=8)
        axis.set_xlabel("NLL (left is better)", fontsize=8)
        axis.set_ylabel("α (up is better)", fontsize=8)
        axis.grid(alpha=0.3)
    for axis in flat[len(groups) :]:
        axis.remove()
    named = {
        label: handle for axis in flat[: len(groups)] for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=min(5, columns + 1), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _look_near(axis: Any, points: dict[Cell, tuple[float, float]]) -> list[str]:
    """Leaves out what is so far off that all others would be one dot; returns who that is."""
    x, y = ([point[i] for point in points.values()] for i in (0, 1))
    worst = min(x) + 10 * (median(x) - min(x)), max(y) - 10 * (max(y) - median(y))
    far = [own.method for own, point in points.items() if point[0] > worst[0] > min(x) or point[1] < worst[1] < max(y)]
    near = [point for own, point in points.items() if own.method not in far]
    if far:
        for i, limit in ((0, axis.set_xlim), (1, axis.set_ylim)):
            low, high = min(point[i] for point in near), max(point[i] for point in near)
            margin = 0.06 * (high - low) or 0.01 * abs(high) or 0.01  # all of those may be equal
            limit(low - margin, high + margin)
    return far


def _centre(results: Results, cell: Cell, measure: str) -> float:
    return interval(list(results.values(cell, measure).values()))[0]


def front_of(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point beats in both: less of the first and more of the second, in the order of the first."""
    found: list[tuple[float, float]] = []
    for point in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if not found or point[1] > found[-1][1]:
            found.append(point)
    return found
