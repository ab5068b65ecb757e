"""From numbers of single examples to a metric with its 95 % interval: examples are resampled, never tokens."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

from speckd.box import pass_at_k

Array: TypeAlias = NDArray[np.float64]
#: One example's numbers by column; a column that an example lacks is one that it has no part in.
Columns: TypeAlias = Mapping[str, float]

CONFIDENCE = 0.95
RESAMPLES = 2000
#: Numbers that scipy holds at once.
_HELD = 2**22


@dataclass(frozen=True)
class Metric:
    """How one number comes about. `statistic`: a name in `STATISTICS`; `columns`: what it is made of; `of`: what it divides by,
    in words; `k`: of pass@k, whose columns, how many passed of how many, become an estimate for each example."""

    name: str
    columns: tuple[str, ...]
    of: str
    statistic: str = "ratio"
    k: int | None = None

    def matrix(self, examples: Sequence[Columns]) -> Array:
        """[n, columns] of the examples that have them all."""
        having = [example for example in examples if all(name in example for name in self.columns)]
        numbers = [[float(example[name]) for name in self.columns] for example in having]
        if self.k is not None:
            numbers = [[pass_at_k(round(all_of_it), round(passed), self.k), 1.0] for passed, all_of_it in numbers]
        return np.array(numbers).reshape(-1, len(self.columns))


def ratio(sums: Array) -> Array:
    """[..., n, 2] numerators and denominators -> Σ numerators / Σ denominators, [...]."""
    total = sums.sum(-2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(total[..., 0] / total[..., 1])


def median(values: Array) -> Array:
    """[..., n, 1] -> the median over examples, [...]."""
    return np.asarray(np.median(values[..., 0], axis=-1))


def calibration_error(sums: Array) -> Array:
    """[..., n, 1 + 2·bins]: tokens, then by bin the confidences' and the right answers' sums -> ECE, [...].

        ECE = Σ_b |Σ_{i in b} confidence_i − Σ_{i in b} correct_i| / tokens

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3, with bins of equal width.
    """
    total = sums.sum(-2)
    bins = (total.shape[-1] - 1) // 2
    gap = np.abs(total[..., 1 : 1 + bins] - total[..., 1 + bins :]).sum(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(gap / total[..., 0])


STATISTICS: dict[str, Callable[[Array], Array]] = {
    "ratio": ratio,
    "median": median,
    "calibration_error": calibration_error,
}


def value(metric: Metric, examples: Sequence[Columns]) -> float | None:
    """The metric over some examples; None where nothing is to be divided by."""
    matrix = metric.matrix(examples)
    return None if not len(matrix) else _finite(STATISTICS[metric.statistic](matrix))


def summary(metric: Metric, examples: Sequence[Columns], seed: int) -> dict[str, Any]:
    """As it stands in `evaluation.json`: the value, its interval (None below two examples), what it divides by, and of how many
    examples it is."""
    matrix = metric.matrix(examples)
    low, high = interval(STATISTICS[metric.statistic], matrix, seed)
    found = {"value": value(metric, examples), "low": low, "high": high, "of": metric.of, "n": len(matrix)}
    made = {"statistic": metric.statistic, "columns": list(metric.columns)}
    return found | made | ({} if metric.k is None else {"k": metric.k})


def interval(statistic: Callable[[Array], Array], matrix: Array, seed: int) -> tuple[float | None, float | None]:
    """The percentile bootstrap's 95 % interval (Efron 1979) over the rows of [n, columns], by SciPy; None below two rows."""
    rows = len(matrix)
    if rows < 2 or _finite(statistic(matrix)) is None:
        return None, None
    found = bootstrap(
        (np.arange(rows),),
        lambda index, axis: statistic(matrix[np.moveaxis(np.asarray(index), axis, -1)]),
        n_resamples=RESAMPLES,
        batch=max(1, _HELD // matrix.size),
        vectorized=True,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return _finite(found.low), _finite(found.high)


def difference(metric: Metric, pairs: Sequence[tuple[Columns, Columns]], seed: int) -> dict[str, Any]:
    """Second minus first, over the same examples, resampled in pairs."""
    both = [(a, b) for a, b in pairs if all(name in a and name in b for name in metric.columns)]
    first, second = (metric.matrix([pair[side] for pair in both]) for side in (0, 1))
    width, statistic = len(metric.columns), STATISTICS[metric.statistic]

    def gap(matrix: Array) -> Array:
        return np.asarray(statistic(matrix[..., width:]) - statistic(matrix[..., :width]))

    joined = np.concatenate([first, second], -1)
    low, high = interval(gap, joined, seed)
    values = [None if not len(each) else _finite(statistic(each)) for each in (first, second)]
    return {"first": values[0], "second": values[1], "difference": _finite(gap(joined)) if both else None,
            "low": low, "high": high, "n": len(both)}  # fmt: skip


def _finite(number: Any) -> float | None:
    found = float(number)
    return found if math.isfinite(found) else None
