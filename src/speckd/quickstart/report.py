"""The quickstart's table, picture and one honest sentence."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from speckd.over_seeds import Difference, paired

COLUMNS = {
    "accuracy": "accuracy",
    "instruction": "instr.",
    "math": "math",
    "code": "code",
    "kl": "KL",
    "agreement": "agree",
    "tau": "τ",
    "tar": "TAR",
}
_LEGEND = (
    "Held-out tasks; mean ± standard deviation over {n} seed{s}. accuracy: mean of three families, programs are run; KL (nats "
    "a token) and agreement: to the clean teacher; τ: tokens per teacher call, student drafting 5; TAR: Top-5 rule for all."
)

Results = Sequence[dict[str, Any]]


def _cells(runs: Results) -> list[tuple[str, str]]:
    return list(dict.fromkeys((r["job"]["method"], r["job"]["teacher"]) for r in runs))


def _values(runs: Results, method: str, teacher: str, measure: str) -> list[float]:
    """By seed, in the order of seeds."""
    own = [r for r in runs if (r["job"]["method"], r["job"]["teacher"]) == (method, teacher)]
    return [r["measures"][measure] for r in sorted(own, key=lambda r: r["job"]["seed"])]


def _spread(values: Sequence[float]) -> str:
    digits = 2 if statistics.mean(values) >= 2 else 3
    deviation = f" ±{statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def _seeds(runs: Results) -> int:
    return len({r["job"]["seed"] for r in runs})


def _rows(runs: Results) -> list[list[str]]:
    found = []
    for method, teacher in _cells(runs):
        shown = "none" if method == "SFT" else teacher
        found.append([method, shown, *(_spread(_values(runs, method, teacher, name)) for name in COLUMNS)])
    return found


def legend(runs: Results) -> str:
    n = _seeds(runs)
    return _LEGEND.format(n=n, s="" if n == 1 else "s")


def markdown(runs: Results) -> str:
    head = ["method", "teacher", *COLUMNS.values()]
    lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *_rows(runs))]
    return "\n".join(lines) + f"\n\n{legend(runs)}"


def rich_table(runs: Results) -> Table:
    """For a terminal of 80 columns: the spread stands below its mean, one block for each teacher."""
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    for name in COLUMNS.values():
        table.add_column(name, justify="right", no_wrap=True)
    before = None
    for method, teacher, *values in _rows(runs):
        if teacher != before:
            table.add_section()
            table.add_row("[bold]no teacher[/]" if teacher == "none" else f"[bold]{teacher}[/]")
        before = teacher
        table.add_row(method.replace(", ", ",\n"), *(value.replace(" ±0.", "\n±.").replace(" ", "\n") for value in values))
    return table


def change(runs: Results, method: str, teacher: str, measure: str) -> Difference:
    """A method minus ungated, paired by seed."""
    own, other = (dict(enumerate(_values(runs, name, teacher, measure))) for name in (method, "ungated"))
    return paired(own, other)


def _said(gap: Difference, more_is_better: bool) -> str:
    if math.isnan(gap.low):
        return f"{gap.mean:+.3f} (one seed: no interval)"
    verdict = gap.verdict(more_is_better)
    return f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}] ({'not clearly different' if verdict == '=' else verdict})"


def sentence(runs: Results) -> str:
    """What the table shows, whichever way it falls."""
    methods = {"masking what the gate rejects": "mask", "the label ratio, with the label for the rest,": "label ratio"}
    parts = []
    for teacher in dict.fromkeys(teacher for _, teacher in _cells(runs)):
        said = []
        for text, name in methods.items():
            method = next(m for m, _ in _cells(runs) if name in m)
            kl = _said(change(runs, method, teacher, "kl"), more_is_better=False)
            accuracy = _said(change(runs, method, teacher, "accuracy"), more_is_better=True)
            said.append(f"{text} changed KL to the clean teacher by {kl} and accuracy by {accuracy}")
        parts.append(f"with the {teacher} teacher {', and '.join(said)}")
    return (
        f"Against ungated distillation, paired by seed, 95 % t-intervals: {'; '.join(parts)}. "
        "Small models, synthetic tasks: a demonstration, not a proof."
    )


def draw(runs: Results, path: Path) -> None:
    """Acceptance rate and loss along training, mean over seeds, for both teachers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    teachers = list(dict.fromkeys(teacher for _, teacher in _cells(runs)))
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), sharex=True, sharey="row", layout="constrained")
    colours = plt.get_cmap("cividis")
    methods = list(dict.fromkeys(method for method, _ in _cells(runs)))
    styles = dict(zip(methods, ("-", "--", "-.", ":", (0, (3, 1, 1, 1))), strict=False))
    for column, teacher in enumerate(teachers):
        for i, method in enumerate(methods):
            where = teacher if any((method, teacher) == cell for cell in _cells(runs)) else teachers[0]  # SFT has no teacher
            own = [r["curve"] for r in runs if (r["job"]["method"], r["job"]["teacher"]) == (method, where)]
            for row, name in enumerate(("tar", "loss")):
                if not all(name in point for curve in own for point in curve):
                    continue
                means = [statistics.mean(points) for points in zip(*[[p[name] for p in c] for c in own], strict=True)]
                shade = colours(i / len(methods))
                axes[row][column].plot([p["step"] for p in own[0]], means, linestyle=styles[method], color=shade, label=method)
        axes[0][column].set_title(f"teacher: {teacher}")
        axes[1][column].set_xlabel("optimizer step after the SFT start")
    axes[0][0].set_ylabel("token acceptance rate\n(soft gate: mean weight)")
    axes[1][0].set_ylabel("training loss, nats a token\n(each method's own)")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    axes[1][0].legend(fontsize=8)
    figure.suptitle(f"speckd quickstart: mean over {_seeds(runs)} seeds")
    figure.savefig(path, dpi=110)
    plt.close(figure)
