"""Metrics and their intervals."""

import numpy as np
import pytest
from scipy.stats import bootstrap

from speckd.evaluation.statistics import Metric, difference, interval, ratio, summary, value

MEAN = Metric("mean", ("x", "examples"), "examples")
TAU = Metric("tau", ("tokens", "calls"), "calls")


def examples(values: list[float]) -> list[dict[str, float]]:
    return [{"x": each, "examples": 1.0} for each in values]


def test_of_a_mean_it_is_scipys_own_percentile_interval() -> None:
    values = np.random.default_rng(0).normal(size=40)
    found = summary(MEAN, examples(values.tolist()), seed=3)
    own = bootstrap((values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(3), batch=2**22 // 80)
    assert found["value"] == pytest.approx(values.mean())
    assert (found["low"], found["high"]) == pytest.approx(tuple(own.confidence_interval))
    assert found["n"] == 40 and found["of"] == "examples"


def test_about_95_of_a_hundred_intervals_hold_the_truth() -> None:
    """Of a ratio of sums, as τ is: 1 to 6 tokens a call, uneven calls. Binomial(200, 0.95) is below 178 once in 1,000."""
    rng = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        calls = rng.integers(1, 9, size=60).astype(float)
        tokens = np.array([rng.integers(1, 7, size=int(n)).sum() for n in calls], dtype=float)
        low, high = interval(ratio, np.stack([tokens, calls], -1), seed)
        assert low is not None and high is not None
        held += low <= 3.5 <= high
    assert 178 <= held <= 200


def test_a_ratio_divides_sums_and_does_not_average_ratios() -> None:
    assert value(TAU, [{"tokens": 6, "calls": 1}, {"tokens": 4, "calls": 4}]) == 2.0


def test_what_has_no_part_in_a_metric_is_not_counted() -> None:
    found = summary(TAU, [{"tokens": 6, "calls": 2}, {"other": 1.0}, {"tokens": 3, "calls": 1}], seed=0)
    assert (found["value"], found["n"]) == (3.0, 2)


@pytest.mark.parametrize("few", [[], [{"tokens": 3.0, "calls": 0.0}]])
def test_nothing_to_divide_by_is_no_number(few: list[dict[str, float]]) -> None:
    assert summary(TAU, few, seed=0)["value"] is None


def test_one_example_has_no_interval() -> None:
    found = summary(MEAN, examples([2.0]), seed=0)
    assert (found["value"], found["low"], found["high"]) == (2.0, None, None)


def test_ece_is_the_gap_of_confidence_and_accuracy_by_bin() -> None:
    columns = ("supervised", "c.0", "c.1", "r.0", "r.1")
    ece = Metric("ece", columns, "tokens", "calibration_error")
    one = dict(zip(columns, (4.0, 0.6, 1.8, 1.0, 1.0), strict=True))  # 2 tokens in each bin
    other = dict(zip(columns, (2.0, 0.4, 0.9, 0.0, 1.0), strict=True))
    assert value(ece, [one, other]) == pytest.approx((abs(1.0 - 1.0) + abs(2.7 - 2.0)) / 6)


def test_paired_differences_are_sharper_than_the_metrics_themselves() -> None:
    """Second is first plus 0.1 throughout, and examples differ by far more."""
    values = np.random.default_rng(2).normal(size=50)
    pairs = list(zip(examples(values.tolist()), examples((values + 0.1).tolist()), strict=True))
    found = difference(MEAN, pairs, seed=0)
    assert found["difference"] == pytest.approx(0.1) and found["low"] == pytest.approx(0.1) and found["n"] == 50
