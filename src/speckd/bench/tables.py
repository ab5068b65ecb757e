"""What a benchmark found, as Markdown: means, paired differences from the references, and each method's tally of cells."""

import math
from collections.abc import Iterator, Sequence
from statistics import mean

from speckd.bench.plan import Cell, Plan
from speckd.bench.runner import Found, Outcome
from speckd.over_seeds import BOOTSTRAP_SEEDS, Difference, holm, interval, paired, two_level

#: measure -> (its name in the tables, is more better?)
MEASURES = {
    "nll": ("NLL", False),
    "accuracy": ("accuracy", True),
    "ece": ("ECE", False),
    "kl": ("KL", False),
    "agreement": ("agreement", True),
    "alpha": ("α", True),
    "tau": ("τ", True),
}
#: What each aim is judged by.
AIM_MEASURES = {"quality": ("nll", "accuracy", "ece"), "draft": ("alpha", "tau")}

#: In what the oracle's gain is shared out.
_GAINS = ("nll", "kl", "alpha", "tau")

LEGEND = """\
Held-out tasks, against the clean teacher, whatever teacher was trained with. NLL: nats a token of the tasks' own completions;
accuracy: share of right answers, mean of the three families, programs run; ECE: expected calibration error of the most
probable token, 15 bins; KL: nats a token, clean teacher to student; agreement of the two argmaxes; α = Σ min(p, q), a token;
τ: tokens per teacher call, the student drafting 5 greedily. rate: the learning rate, chosen on validation tasks unless said
otherwise; (lowest), (highest): of those tried, so that a better one may lie beyond. TAR: mean acceptance, by the method's own
gate, of the training tokens. Means over seeds; ± and [ , ]: 95 % t-intervals over seeds, differences paired by seed; **bold**:
the interval excludes 0; *: so it does after Holm's correction over the methods of the cell, for each measure by itself. The
bootstrap over seeds and problems stands only where there are 8 seeds or more; fewer cover far less than 95 %.
"""


class Results:
    """The runs of a plan, by cell."""

    def __init__(self, plan: Plan, found: Sequence[Found]) -> None:
        self.plan = plan
        self._runs: dict[Cell, dict[int, Found]] = {}
        for one in found:
            self._runs.setdefault(one.cell, {})[one.seed] = one

    def groups(self) -> Iterator[tuple[Cell, list[Cell]]]:
        """Cells that differ in the method alone, with who needs no teacher among them; by one cell that stands for them."""
        seen: dict[tuple[str, str, str, str], list[Cell]] = {}
        for cell in self._runs:
            seen.setdefault((cell.block, cell.start, cell.data, cell.teacher), []).append(cell)
        for cells in seen.values():
            names = {cell.method for cell in cells}
            shared = [c for c in self._teacherless(cells[0]) if c.method not in names]
            order = list(self.plan.methods)
            yield cells[0], sorted([*cells, *shared], key=lambda c: order.index(c.method))

    def _teacherless(self, like: Cell) -> list[Cell]:
        return [
            c
            for c in self._runs
            if (c.block, c.start, c.data) == (like.block, like.start, like.data)
            and not self.plan.methods[c.method].needs_teacher
        ]

    def values(self, cell: Cell, measure: str) -> dict[int, float]:
        return {seed: one.outcome["measures"][measure] for seed, one in self._runs[cell].items()}

    def right(self, cell: Cell) -> dict[int, str]:
        return {seed: one.outcome["right"] for seed, one in self._runs[cell].items()}

    def one(self, cell: Cell) -> Found:
        return next(iter(self._runs[cell].values()))

    def tuned(self, cell: Cell) -> bool:
        """Was its learning rate chosen among several?"""
        return self.plan.tuned(next(block for block in self.plan.blocks if block.name == cell.block), cell)

    def acceptance(self, cell: Cell) -> float:
        rates = [run.outcome["training"].get("tar_micro", math.nan) for run in self._runs[cell].values()]
        return mean(rates)

    def against(self, cells: Sequence[Cell], reference: str, measure: str) -> dict[str, Difference]:
        """By method, each minus the reference; empty where the reference is not among the cells."""
        base = next((c for c in cells if c.method == reference), None)
        if base is None:
            return {}
        other = self.values(base, measure)
        own = {c.method: self.values(c, measure) for c in cells if c.method != reference}
        return {name: paired(values, other) for name, values in own.items() if values.keys() & other.keys()}


def markdown(plan: Plan, outcome: Outcome) -> str:
    results = Results(plan, outcome.found)
    parts = [LEGEND]
    if outcome.failed:
        parts.append(f"**Incomplete**: {len(outcome.failed)} runs failed and are missing: {'; '.join(outcome.failed)}.")
    for block in plan.blocks:
        tally = _tally(results, block.name)
        budget = "steps; who asks no teacher trains for as much compute" if block.budget == "compute" else "steps"
        rate = "" if block.learning_rate is None else f" Learning rate {block.learning_rate:g} for all, not tuned."
        parts.append(f"## {block.name}\n\n{block.seeds} seeds, {block.steps} {budget}.{rate}\n\n{tally}")
        for cell, cells in results.groups():
            if cell.block == block.name:
                parts.append(_group(results, cell, cells))
    return "\n\n".join(parts) + "\n"


def _group(results: Results, cell: Cell, cells: Sequence[Cell]) -> str:
    lines = [f"### {cell.start}, {cell.teacher}, {cell.data}\n"]
    if any(map(results.tuned, cells)) and cell.teacher in results.plan.tuned_with:
        lines.append(f"Learning rates are those for the teacher {results.plan.tuned_with[cell.teacher]}.\n")
    lines += _head(["method", "rate", "TAR"])
    for own in cells:
        values = [_mean(list(results.values(own, name).values()), _digits(name)) for name in MEASURES]
        accepted = results.acceptance(own)
        shown = "–" if math.isnan(accepted) else f"{accepted:.2f}"
        lines.append(f"| {_escaped(own.method)} | {_rate(results, own)} | {shown} | {' | '.join(values)} |")
    for reference in results.plan.references:
        gaps = {name: results.against(cells, reference, name) for name in MEASURES}
        if not gaps["nll"]:
            continue
        lines += [f"\nMinus {reference}:\n", *_head(["method"])]
        adjusted = {name: dict(zip(found, holm([d.p for d in found.values()]), strict=True)) for name, found in gaps.items()}
        for own in cells:
            if own.method in gaps["nll"]:
                shown_gaps = [_gap(gaps[name][own.method], adjusted[name][own.method], _digits(name)) for name in MEASURES]
                lines.append(f"| {_escaped(own.method)} | {' | '.join(shown_gaps)} |")
        if problems := _problems(results, cells, reference):
            lines.append(f"\nAccuracy minus {reference}, 95 %, bootstrap over seeds and problems: {problems}.")
    return "\n".join([*lines, *_oracle_shares(results, cells)])


def _oracle_shares(results: Results, cells: Sequence[Cell]) -> list[str]:
    """What part of the oracle's gain over the first reference each method has, where there is an oracle."""
    oracle = next((c for c in cells if results.plan.methods[c.method].oracle), None)
    base = next((c for c in cells if c.method in results.plan.references[:1]), None)
    if oracle is None or base is None:
        return []
    said = []
    for own in cells:
        if own not in (oracle, base):
            parts = [f"{MEASURES[name][0]} {gain_share(results, own, oracle, base, name)}" for name in _GAINS]
            said.append(f"{own.method}: {', '.join(parts)}")
    return [f"\nShare of the oracle's gain over {base.method} (lowest seed to highest): {'; '.join(said)}."]


def gain_share(results: Results, own: Cell, oracle: Cell, base: Cell, measure: str) -> str:
    """In per cent: of the means over seeds, and the range over seeds."""
    values, best, start = (results.values(cell, measure) for cell in (own, oracle, base))
    seeds = sorted(values.keys() & best.keys() & start.keys())
    each = [(values[s] - start[s]) / (best[s] - start[s]) for s in seeds if best[s] != start[s]]
    gain, whole = sum(values[s] - start[s] for s in seeds), sum(best[s] - start[s] for s in seeds)
    return f"{100 * gain / whole:.0f} % ({100 * min(each):.0f} to {100 * max(each):.0f})" if each and whole else "–"


def _rate(results: Results, cell: Cell) -> str:
    rate, ladder = results.one(cell).learning_rate, results.plan.ladder
    if results.plan.methods[cell.method].untrained:
        return "–"
    if not results.tuned(cell) or ladder[0] < rate < ladder[-1]:
        return f"{rate:g}"
    return f"{rate:g} ({'lowest' if rate == ladder[0] else 'highest'})"


def _problems(results: Results, cells: Sequence[Cell], reference: str) -> str:
    """Of those with enough seeds for a bootstrap over them."""
    base = results.right(next(c for c in cells if c.method == reference))
    found = []
    for own in cells:
        if own.method != reference and len(results.right(own).keys() & base.keys()) >= BOOTSTRAP_SEEDS:
            low, high = two_level(results.right(own), base)
            found.append(f"{own.method} [{low:+.3f}, {high:+.3f}]")
    return "; ".join(found)


def _head(first: list[str]) -> list[str]:
    names = [*first, *(f"{name} {'↑' if more else '↓'}" for name, more in MEASURES.values())]
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _escaped(name: str) -> str:
    """A name of the user's in a table's row."""
    return name.replace("|", "\\|")


def _digits(measure: str) -> int:
    """Of α four: what matters in it is small."""
    return 4 if measure == "alpha" else 3


def _mean(values: list[float], digits: int) -> str:
    centre, half = interval(values)
    return f"{centre:.{digits}f}" + ("" if math.isnan(half) else f" ±{half:.{digits}f}")


def _gap(gap: Difference, adjusted: float, digits: int) -> str:
    mean = f"{gap.mean:+.{digits}f}"
    if math.isnan(gap.low):
        return mean
    shown = f"**{mean}**" if gap.low > 0 or gap.high < 0 else mean
    return f"{shown} [{gap.low:+.{digits}f}, {gap.high:+.{digits}f}]{'*' if adjusted < 0.05 else ''}"


# ---- who is worse anywhere? --------------------------------------------------------------------------------------------------


def _tally(results: Results, block: str) -> str:
    """For each method: in how many cells its interval lies on the worse, or the better, side of each reference, or has both."""
    groups = [cells for cell, cells in results.groups() if cell.block == block]
    columns = [(aim, reference) for aim in AIM_MEASURES for reference in results.plan.references]
    head = ["method", *(f"{aim}, against {reference}" for aim, reference in columns)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for method in results.plan.methods:
        own = [cells for cells in groups if any(c.method == method for c in cells)]
        if own:
            lines.append(f"| {_escaped(method)} | {' | '.join(_count(results, own, method, *column) for column in columns)} |")
    names = "; ".join(f"{aim}: {', '.join(MEASURES[m][0] for m in own)}" for aim, own in AIM_MEASURES.items())
    said = f"Worse / not told apart / better, over cells and measures ({names}), by the unadjusted 95 % interval"
    return "\n".join([*lines, f"\n{said}; –: there is none, as of one seed."])


def _count(results: Results, groups: Sequence[list[Cell]], method: str, aim: str, reference: str) -> str:
    """Each pair of cells once: two who ask no teacher stand in every teacher's group."""
    verdicts, seen = [], set()
    for cells in groups:
        pair = tuple(cell for cell in cells if cell.method in (method, reference))
        if pair in seen:
            continue
        seen.add(pair)
        for measure in AIM_MEASURES[aim]:
            gaps = results.against(cells, reference, measure)
            if method in gaps and not math.isnan(gaps[method].low):
                verdicts.append(gaps[method].verdict(MEASURES[measure][1]))
    if not verdicts:
        return "–"
    return " / ".join(str(verdicts.count(word)) for word in ("worse", "=", "better"))
