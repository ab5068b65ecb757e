"""What `real_data.py` found, as Markdown: means over seeds, and differences paired by seed with t-intervals."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from real_measures import ANSWERS
from speckd.over_seeds import Difference, holm, interval, paired

#: measure -> (its name, is more better?)
MEASURES = {
    "nll": ("NLL", False),
    "kl": ("KL", False),
    "agreement": ("agreement", True),
    "alpha": ("α", True),
    "tau": ("τ", True),
}
ANSWERED = {"strict_match": "exact match", "pass@1": "pass@1", "rouge_l": "ROUGE-L"}
LEGEND = """\
Held-out texts, all against the clean teacher. NLL, KL(clean teacher to student): nats a token of the completions, the end token
among them; agreement of the two argmaxes; α = Σ min(p, q), a token; τ: tokens per teacher call, the student drafting 5
greedily, along the teacher's own greedy text. Exact match: the number behind `#### ` is the reference's, greedy answers;
pass@1: the program passes all of its tests in the box; ROUGE-L: F, a completion. Means over seeds; ± and [ , ]: 95 %
t-intervals over seeds (none from one seed), differences paired by seed; **bold**: the interval excludes 0; *: so it does after
Holm's correction over the methods of the table."""


@dataclass(frozen=True)
class Found:
    """One run: `seed` None of the teacher itself; `measures` by source."""

    seed: int | None
    method: str
    teacher: str
    measures: Mapping[str, Mapping[str, float]]


def tables(found: Sequence[Found], methods: Sequence[str], teachers: Sequence[str]) -> str:
    """All of them; `methods`: in order, the first of which asks no teacher."""
    parts = [LEGEND]
    parts += ["## Mean of the four sources", *_means(found, methods, teachers, None)]
    for base in methods[:2]:
        for teacher in teachers:
            lines = _against(found, methods, teacher, base)
            if len(lines) > 2:  # some method is there
                parts += [f"### Minus {base}; {teacher} teacher", *lines]
    for source in ANSWERS:
        parts += [f"## {source}", *_means(found, methods, teachers, source)]
    return "\n\n".join(["\n".join(lines) for lines in _joined(parts)])


def _joined(parts: Sequence[str]) -> Iterator[list[str]]:
    """Lines of one table stay together."""
    lines: list[str] = []
    for part in parts:
        if part.startswith("|") and lines and lines[-1].startswith("|"):
            lines.append(part)
            continue
        if lines:
            yield lines
        lines = [part]
    yield lines


def values(found: Sequence[Found], method: str, teacher: str, source: str | None, measure: str) -> dict[int, float]:
    """By seed; of all sources their mean."""
    own = [one for one in found if one.seed is not None and (one.method, one.teacher) == (method, teacher)]
    some = {one.seed: [one.measures[name][measure] for name in ([source] if source else ANSWERS)] for one in own}
    return {seed: mean(each) for seed, each in some.items() if seed is not None}


def _means(found: Sequence[Found], methods: Sequence[str], teachers: Sequence[str], source: str | None) -> list[str]:
    names = [name for name, _ in MEASURES.values()]
    shown = list(MEASURES)
    if source is not None:
        asked = round(found[0].measures[source]["asked"])
        names.append(f"{ANSWERED[ANSWERS[source].metric]} (of {asked})")
        shown.append("answers")
    lines = ["| method | teacher | seeds | " + " | ".join(names) + " |", "|---|---|---|" + "---|" * len(names)]
    themselves = [one for one in found if one.seed is None]
    for one in themselves:
        own = {name: mean(one.measures[s][name] for s in ([source] if source else ANSWERS)) for name in shown}
        cells = ["–" if name in ("kl", "agreement", "alpha", "tau") else f"{own[name]:.3f}" for name in shown]
        lines.append(f"| the teacher itself | – | – | {' | '.join(cells)} |")
    for method, teacher in [("start", "–"), *((m, t) for t in teachers for m in methods)]:
        first = values(found, method, teacher, source, "nll")
        if first:
            cells = [_cell(list(values(found, method, teacher, source, name).values())) for name in shown]
            whose = "–" if method == methods[0] else teacher
            lines.append(f"| {method} | {whose} | {len(first)} | {' | '.join(cells)} |")
    return lines


def _cell(own: Sequence[float]) -> str:
    centre, half = interval(own)
    return f"{centre:.3f}" if math.isnan(half) else f"{centre:.3f} ± {half:.3f}"


def _against(found: Sequence[Found], methods: Sequence[str], teacher: str, base: str) -> list[str]:
    """Each method minus `base`, which is always the one with the same teacher; SFT has none, and so stands for both."""
    whose = dict.fromkeys(methods, teacher) | {methods[0]: "clean"}
    gaps: dict[str, dict[str, Difference]] = {}
    for measure in MEASURES:
        other = values(found, base, whose[base], None, measure)
        for method in methods:
            own = values(found, method, whose[method], None, measure)
            if method != base and own.keys() & other.keys():
                gaps.setdefault(measure, {})[method] = paired(own, other)
    lines = ["| method | " + " | ".join(name for name, _ in MEASURES.values()) + " |", "|---" * (1 + len(MEASURES)) + "|"]
    stars = {measure: dict(zip(own, holm([one.p for one in own.values()]), strict=True)) for measure, own in gaps.items()}
    for method in next(iter(gaps.values()), {}):
        cells = [_gap(gaps[name][method], stars[name][method], MEASURES[name][1]) for name in MEASURES]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _gap(gap: Difference, corrected: float, more_is_better: bool) -> str:
    if math.isnan(gap.low):
        return f"{gap.mean:+.3f}"
    text = f"{gap.mean:+.3f} [{gap.low:+.3f}, {gap.high:+.3f}]"
    verdict = gap.verdict(more_is_better)
    return text if verdict == "=" else f"**{text}** {verdict}{'*' if corrected < 0.05 else ''}"
