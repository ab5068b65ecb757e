"""Time and memory against tokens, vocabulary and acceptance, as small multiples."""

import statistics
import textwrap
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

#: Okabe and Ito's colours, told apart without colour by line and marker.
STYLES = [("#000000", ":", ""), ("#0072B2", "-", "o"), ("#E69F00", "--", "s"), ("#009E73", "-.", "^"), ("#D55E00", "-", "v")]
LABELS = {"tokens": "positions N", "vocabulary": "vocabulary V", "acceptance": "acceptance rate"}


def draw(points: list[dict[str, Any]], words: str, path: Path) -> None:
    axes_names = list(dict.fromkeys(point["axis"] for point in points))
    names = list(points[0]["candidates"])
    figure, grid = plt.subplots(
        2, len(axes_names), figsize=(max(7.0, 4.2 * len(axes_names)), 7.0), sharex="col", squeeze=False, layout="constrained"
    )
    for column, axis in enumerate(axes_names):
        of_axis = [point for point in points if point["axis"] == axis]
        values = [point["value"] for point in of_axis]
        for name, (color, line, marker) in zip(names, STYLES, strict=False):
            members = [point["candidates"][name] for point in of_axis]
            look = {"color": color, "linestyle": line, "marker": marker, "label": name}
            grid[0, column].plot(values, [statistics.median(m["seconds"]) for m in members], **look)
            if "bytes" in members[0]:
                grid[1, column].plot(values, [m["bytes"] / 2**20 for m in members], **look)
        least = [_least(point) for point in of_axis]
        grid[1, column].plot(values, least, color="#000000", linestyle=":")
        grid[0, column].set(ylim=0, title=f"against {axis}")
        grid[1, column].set(yscale="log", xlabel=LABELS[axis])
        grid[1, column].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        grid[1, column].yaxis.set_major_formatter("{x:g}")
        grid[1, column].yaxis.set_minor_locator(NullLocator())
        for row in grid[:, column]:
            row.grid(alpha=0.3)
            row.set_xticks(values, [f"{value / 1000:.0f} k" if axis == "vocabulary" else f"{value:g}" for value in values])
        if axis == "acceptance":
            grid[0, column].invert_xaxis()
    grid[0, 0].set_ylabel("seconds a step")
    grid[1, 0].set_ylabel("peak memory over the inputs, MiB")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    labels[0] += " (time: bare products; memory: dW and two chunk buffers)"
    figure.legend(handles, labels, loc="outside lower center", ncols=1, frameon=False)
    figure.suptitle("Forward KL at the head: loss and gradients\n" + textwrap.fill(words, 90), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _least(point: dict[str, Any]) -> float:
    """MiB of dW and two float32 buffers of one chunk."""
    shape = point["shape"]
    return 4 * shape["vocabulary"] * (shape["student_width"] + 2 * point["chunk"]) / 2**20
