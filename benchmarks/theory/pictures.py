"""The study's five pictures. Okabe and Ito's colours, told apart by line and marker too."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BLACK, BLUE, ORANGE, GREEN, RED, PINK, SKY = "#000000", "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
LOOKS = [(BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, "-.", "^"), (RED, ":", "v"), (PINK, "-", "D"), (SKY, "--", "P")]


def _save(figure: Any, path: Path, dpi: int = 100) -> None:
    unfinished = path.with_name(path.name + ".tmp")
    figure.savefig(unfinished, dpi=dpi, format="png")
    unfinished.replace(path)
    plt.close(figure)


def _words(name: str) -> str:
    return name.replace("_", " ")


def monotone(results: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.6), layout="constrained", width_ratios=(1, 1, 1.5))
    trace = results["shared_example"]
    for name, color, line in (("gated", BLUE, "-"), ("ungated", ORANGE, "--")):
        axes[0].plot(trace[name]["tar"], color=color, linestyle=line, label="Top-2, mask" if name == "gated" else "no gate")
        axes[1].plot([row[1] for row in trace[name]["kl"]], color=color, linestyle=line)
    axes[0].set(
        xlabel="step",
        ylabel="TAR (Top-2) of two contexts",
        ylim=(0.4, 1.04),
        title="smallest example: TAR falls",
        xlim=(0, 150),
    )
    axes[1].set(xlabel="step", ylabel="KL of the rejected context, nats", ylim=0, title="and what is rejected gets worse")
    axes[0].legend(frameon=False, loc="center right")
    names = list(results["gap"])
    cases = (
        ("none", "top_1", "no gate, Top-1's TAR"),
        ("top_1", "top_1", "Top-1 mask, own TAR"),
        ("spec_1", "spec_1", "Spec-1 mask, own TAR"),
    )
    for (gate, judge, label), (color, _, marker) in zip(cases, LOOKS, strict=False):
        shares = [100 * results["gap"][name][gate]["full"][judge]["ends_lower"] for name in names]
        falls = [100 * results["gap"][name][gate]["full"][judge]["falls"] for name in names]
        axes[2].scatter(falls, range(len(names)), color=color, marker=marker, label=label, s=30)
        axes[2].scatter(shares, range(len(names)), facecolors="none", edgecolors=color, marker=marker, s=30)
    axes[2].set_yticks(range(len(names)), [_words(name) for name in names])
    axes[2].invert_yaxis()
    axes[2].set(
        xlabel="% of 100 problems (filled: ever falls; hollow: ends lower)",
        xlim=(-3, 103),
        title="students with a capacity gap, full batch",
    )
    axes[2].grid(alpha=0.3)
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower right", ncols=3, frameon=False)
    _save(figure, path)


def bounds(results: dict[str, Any], path: Path) -> None:
    points = results["scatter"]
    names = [name for name in points if name != "tar"]
    figure, grid = plt.subplots(3, 4, figsize=(12, 8), sharey=True, layout="constrained")
    for axis, name in zip(grid.flat, names, strict=False):
        own = points[name]
        axis.scatter(own["d"], points["tar"], s=3, color=SKY, rasterized=True)
        axis.plot(own["grid"], own["bound"], color=BLACK)
        axis.set(title=_words(name), xscale="log", xlim=(1e-4, None), ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
    for axis in grid.flat[len(names) :]:
        axis.set_axis_off()
    grid.flat[-1].text(0, 0.5, "dots: random pairs p, q\nline: the least TAR that\nthe divergence allows", fontsize=11)
    for row in grid:
        row[0].set_ylabel("TAR of Spec-1, 1 − TV")
    for axis in grid[-1]:
        axis.set_xlabel("D(p, q), nats")
    _save(figure, path, dpi=75)


def escape(results: dict[str, Any], path: Path) -> None:
    found, gated = results["escape"], [name for name in results["escape"] if "mask" in name]
    plain = [name for name in found if name not in ("heights", "cap") and name not in gated]
    quick = [name for name in plain if found[name][-1] < 100]
    slow = [name for name in plain if name not in quick]
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 4.6), sharey=True, layout="constrained")
    for axis, names, title in zip(
        axes,
        (quick, slow, ["forward_kl", *gated]),
        ("ungated, steps grow slowly", "ungated, steps grow exponentially", "forward KL, gated"),
        strict=True,
    ):
        for name, (color, line, marker) in zip(names, [*LOOKS, (BLACK, "-.", "x")], strict=False):
            steps = [value if value < found["cap"] else float("nan") for value in found[name]]
            label = _words(name).replace("forward kl, ", "") if name in gated else _words(name)
            if name.endswith("Top-1 mask"):
                label, steps = "Top-1 mask: never", [found["cap"]] * len(steps)
            axis.plot(found["heights"], steps, color=color, linestyle=line, marker=marker, label=label, markersize=5)
        axis.axhline(found["cap"], color=BLACK, linewidth=0.8, alpha=0.6)
        axis.set(yscale="log", xlabel="logit of the wrong token above the others", title=title, ylim=(0.8, 3_000))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.95))
    axes[0].set_ylabel(f"steps until Top-1 would accept (stopped at {found['cap']:,})")
    _save(figure, path)


def variance(results: dict[str, Any], path: Path) -> None:
    found = results["variance"]
    gates = (
        ("top_1", "Top-1"),
        ("random_at_top_1s_rate", "random, Top-1's rate"),
        ("spec_1", "Spec-1, drawn"),
        ("expected_spec_1", "Spec-1, expected"),
        ("label_ratio", "label ratio"),
    )
    names = list(found["far"])
    figure, grid = plt.subplots(2, 3, figsize=(12.5, 8), sharey=True, layout="constrained")
    measures = (
        ("variance", "valid", "variance, ÷ ungated"),
        ("variance", "weight", "variance, ÷ ungated; normalizer weight"),
        ("relative", "valid", "variance ÷ |mean|², ÷ ungated"),
    )
    for row, (place, title) in zip(grid, (("far", "student far away"), ("near", "student near")), strict=True):
        for axis, (measure, normalizer, label) in zip(row, measures, strict=True):
            for (gate, words), (color, _, marker) in zip(gates, LOOKS, strict=False):
                values = [found[place][name][gate][normalizer][measure] for name in names]
                axis.scatter(values, range(len(names)), color=color, marker=marker, label=words, s=28)
            axis.axvline(1, color=BLACK, linewidth=0.8)
            axis.set(xscale="log", xlabel=label, title=title)
            axis.set_xticks((0.1, 0.3, 1, 3), ("0.1", "0.3", "1", "3"))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        row[0].set_yticks(range(len(names)), [_words(name) for name in names])
    grid[0, 0].invert_yaxis()
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    _save(figure, path)


def smoothness(results: dict[str, Any], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    line = results["line"]
    for (name, values), (color, style, _) in zip(
        ((n, v) for n, v in line.items() if n != "t"), [(BLACK, ":", ""), *LOOKS], strict=False
    ):
        axes[0].plot(line["t"], values, color=color, linestyle=style, label=name, linewidth=1.8)
    axes[0].set(
        xlabel="from a wrong student (0) to the teacher (1)",
        ylabel="loss of one token, nats",
        title="forward KL along one line",
    )
    axes[0].legend(frameon=False)
    curves = results["sharpness"]
    names = [name for name in curves if name != "scales"]
    for place, name in enumerate(names):
        color, style, marker = [*LOOKS, (BLACK, "-.", "x")][place % 7]
        style = style if place < 7 else (0, (1, 1))
        face = color if place < 7 else "white"
        look = {"color": color, "linestyle": style, "marker": marker, "markersize": 5, "markerfacecolor": face}
        axes[1].plot(curves["scales"], curves[name]["all"], label=_words(name), **look)
    axes[1].set(
        xscale="log",
        yscale="log",
        xlabel="scale of the teacher's logits",
        ylabel="largest |curvature| found",
        title="curvature where no verdict flips",
    )
    axes[1].set_xticks(curves["scales"], [f"{scale:g}" for scale in curves["scales"]])
    axes[1].minorticks_off()
    axes[1].legend(frameon=False, fontsize=8, ncols=2, loc="upper left")
    for axis in axes:
        axis.grid(alpha=0.3)
    _save(figure, path)


PICTURES = {"monotone": monotone, "bounds": bounds, "escape": escape, "variance": variance, "smoothness": smoothness}
