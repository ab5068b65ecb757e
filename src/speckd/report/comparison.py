"""Runs that repeat one method with other seeds, put together; methods compared by seed."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t

from speckd.report.runs import Run
from speckd.report.shown import number

#: Held-out measures in the order in which they are shown.
MEASURES = {
    "nll": "NLL (nats a token)",
    "kl": "KL(teacher ‖ student) (nats a token)",
    "kl_at_least": "KL, at least (nats a token)",
    "agreement": "agreement of the top tokens",
    "alpha": "expected acceptance α",
    "alpha_at_least": "α, at least",
    "tar": "TAR (Top-5 rule, mean over sequences)",
    "tar_micro": "TAR (Top-5 rule, over tokens)",
}


@dataclass(frozen=True)
class Estimate:
    """A mean over `n` runs and half of its 95 % interval by Student's t; None for a single run."""

    mean: float
    half: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        n = len(values)
        half = float(t.ppf(0.975, n - 1)) * statistics.stdev(values) / n**0.5 if n > 1 else None
        return cls(statistics.fmean(values), half, n)

    def __str__(self) -> str:
        """The half to two digits, the mean to as many decimals."""
        if self.half is None or not 0 < self.half < 100:
            return number(self.mean) + ("" if self.half is None else f" ± {number(self.half, 2)}")
        decimals = max(0, 1 - math.floor(math.log10(self.half)))
        return f"{self.mean:.{decimals}f} ± {self.half:.{decimals}f}".replace("-", "−")


@dataclass(frozen=True)
class Group:
    """Runs with equal settings but for their seeds."""

    name: str
    runs: tuple[Run, ...]

    def values(self, measure: str) -> list[float]:
        return [run.end[measure] for run in self.runs if measure in run.end]

    def by_seed(self, measure: str) -> dict[str, float]:
        """Of the seeds that one run alone has."""
        seeds = [str(run.settings.get("seed")) for run in self.runs]
        return {
            seed: run.end[measure]
            for seed, run in zip(seeds, self.runs, strict=True)
            if measure in run.end and seeds.count(seed) == 1
        }


def groups(runs: Sequence[Run]) -> list[Group]:
    """In the order in which they were given; named by what their runs' names share, if that is enough to tell them apart."""
    by_method: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        by_method.setdefault(run.method, []).append(run)
    several = list(by_method.values())
    short = [_shared_start([run.name for run in own]) if len(own) > 1 else own[0].name for own in several]
    if not all(short) or len(set(short)) < len(short):
        short = [own[0].name + (f" and {len(own) - 1} more" if len(own) > 1 else "") for own in several]
    return [Group(name, tuple(own)) for name, own in zip(short, several, strict=True)]


def _shared_start(names: Sequence[str]) -> str:
    """Without the number that follows it."""
    letters = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*names, strict=False))
    return "".join(column[0] for column in letters).rstrip("-_/. 0123456789")


def measured(several: Sequence[Group]) -> list[str]:
    return [measure for measure in MEASURES if any(group.values(measure) for group in several)]


def paired(first: Group, second: Group, measure: str) -> Estimate | None:
    """Second minus first, seed by seed; None where they share no seed."""
    one, other = first.by_seed(measure), second.by_seed(measure)
    gaps = [other[seed] - one[seed] for seed in one if seed in other]
    return Estimate.of(gaps) if gaps else None
