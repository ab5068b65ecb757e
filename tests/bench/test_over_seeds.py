"""The statistics against SciPy's and hand-worked ones."""

import math

import numpy as np
import pytest
from scipy import stats

from speckd.bench.pictures import front_of
from speckd.over_seeds import Difference, holm, interval, paired, two_level


def test_the_paired_interval_and_its_p_are_those_of_scipy() -> None:
    generator = np.random.default_rng(0)
    own, other = generator.normal(0.4, 1, 9), generator.normal(0, 1, 9)
    found = paired(dict(enumerate(own)), dict(enumerate(other)))
    wanted = stats.ttest_rel(own, other)
    low, high = wanted.confidence_interval(0.95)
    assert found.mean == pytest.approx((own - other).mean())
    assert (found.low, found.high, found.p) == pytest.approx((low, high, wanted.pvalue))


def test_pairs_are_by_seed_and_a_seed_without_its_pair_is_left_out() -> None:
    found = paired({3: 1.0, 1: 5.0, 9: 100.0}, {1: 4.0, 3: 3.0})
    assert found.mean == pytest.approx(-0.5) and found.pairs == 2
    with pytest.raises(ValueError, match="no seed"):
        paired({1: 1.0}, {2: 1.0})


def test_one_pair_has_no_interval_and_no_verdict() -> None:
    found = paired({0: 1.0}, {0: 0.0})
    assert math.isnan(found.low) and math.isnan(found.p) and found.verdict(True) == "="
    assert math.isnan(interval([2.0])[1])


@pytest.mark.parametrize(
    ("low", "high", "more", "wanted"),
    [(0.1, 0.3, True, "better"), (0.1, 0.3, False, "worse"), (-0.3, -0.1, True, "worse"), (-0.1, 0.3, True, "=")],
)
def test_a_verdict_needs_an_interval_without_zero(low: float, high: float, more: bool, wanted: str) -> None:
    assert Difference((low + high) / 2, low, high, 0.01, 5).verdict(more) == wanted


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    adjusted = holm([math.nan, 0.02])
    assert math.isnan(adjusted[0]) and adjusted[1] == pytest.approx(0.02)


def test_holm_keeps_the_family_error_below_five_per_cent() -> None:
    generator = np.random.default_rng(1)
    wrong = sum(min(holm(list(generator.random(8)))) < 0.05 for _ in range(2000))
    assert stats.binomtest(wrong, 2000, 0.05, alternative="greater").pvalue > 0.01


def test_the_two_level_bootstrap_covers_the_truth_and_sees_the_seeds() -> None:
    generator = np.random.default_rng(2)

    def texts(rates: np.ndarray) -> dict[int, str]:
        return {seed: "".join("01"[int(x)] for x in generator.random(200) < rate) for seed, rate in enumerate(rates)}

    covered = 0
    for trial in range(40):
        spread = generator.normal(0, 0.05, 8)
        low, high = two_level(texts(np.clip(0.5 + spread, 0, 1)), texts(np.full(8, 0.4)), draws=400, seed=trial)
        covered += low <= 0.1 <= high
    assert covered >= 33  # 95 % of 40 is 38
    narrow = two_level(texts(np.full(8, 0.5)), texts(np.full(8, 0.4)), draws=400)
    wide = two_level(texts(np.array([0.2, 0.8] * 4)), texts(np.full(8, 0.4)), draws=400)
    assert wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])


def test_problems_that_are_hard_in_every_seed_are_no_chance_of_a_seed() -> None:
    """One method solves some problems in nearly all seeds and the other the others; over all problems neither is better."""
    generator = np.random.default_rng(3)
    covered = 0
    for trial in range(40):
        mine = generator.random(200) < 0.5
        pair = []
        for rates in (np.where(mine, 0.9, 0.1), np.where(mine, 0.1, 0.9)):
            pair.append({seed: "".join("01"[int(x)] for x in generator.random(200) < rates) for seed in range(8)})
        low, high = two_level(*pair, draws=400, seed=trial)
        covered += low <= 0 <= high
    assert covered >= 33  # 95 % of 40 is 38; with problems drawn for each seed by itself 25


def test_the_front_is_what_nobody_beats_in_both() -> None:
    generator = np.random.default_rng(3)
    points = [tuple(p) for p in generator.integers(0, 12, (60, 2)).tolist()]
    beaten = {p for p in points for o in points if o != p and o[0] <= p[0] and o[1] >= p[1]}
    assert set(front_of(points)) == set(points) - beaten
