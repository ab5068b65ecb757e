"""The quickstart's table, picture and one honest sentence."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

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
#: 97.5 % quantiles of Student's t for n − 1 degrees of freedom, n = 2, 3, …
_T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)
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
    table = Table(caption=legend(runs), caption_justify="left")
    for name in ("method", "teacher", *COLUMNS.values()):
        table.add_column(name, no_wrap=name not in ("method", "teacher"))
    for row in _rows(runs):
        table.add_row(*row)
    return table


def difference(runs: Results, method: str, teacher: str, measure: str = "accuracy") -> str:
    """Method minus ungated, paired by seed, in points, with a 95 % t-interval and what it allows to say."""
    pairs = zip(_values(runs, method, teacher, measure), _values(runs, "ungated", teacher, measure), strict=True)
    gaps = [100 * (own - other) for own, other in pairs]
    mean, n = statistics.mean(gaps), len(gaps)
    if n < 2:
        return f"{mean:+.1f} points (one seed: no interval)"
    half = _T[min(n - 2, len(_T) - 1)] * statistics.stdev(gaps) / math.sqrt(n)
    verdict = "better" if mean - half > 0 else "worse" if mean + half < 0 else "not clearly different"
    return f"{mean:+.1f} points [{mean - half:+.1f}, {mean + half:+.1f}] ({verdict})"


def sentence(runs: Results) -> str:
    """What the table shows, whichever way it falls."""
    clean, unreliable = dict.fromkeys(teacher for _, teacher in _cells(runs))
    masked = next(m for m, _ in _cells(runs) if "masked" in m)
    ours = next(m for m, _ in _cells(runs) if m.startswith("label ratio"))
    return (
        f"Accuracy against ungated distillation, paired by seed, 95 % t-intervals: masking what the gate rejects is "
        f"{difference(runs, masked, clean)} with the clean teacher and {difference(runs, masked, unreliable)} with the "
        f"unreliable one; the label ratio with the label for the rest is {difference(runs, ours, clean)} and "
        f"{difference(runs, ours, unreliable)}. Small models, synthetic tasks: a demonstration, not a proof."
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
