"""Schedules and controllers by themselves: values, direction, memory."""

import json
import math

import pytest

from speckd.gates import Inverted, LabelRatio, Threshold, TopK
from speckd.movers import HoldTAR, Schedule, TAIDPace
from speckd.moving import Clock, Memory, Moved, MovingObjective, Seen
from speckd.objective import Objective


def test_a_schedule_starts_ends_and_stays() -> None:
    for shape in ("linear", "cosine"):
        one = Schedule(20, 5, 100, shape)
        values = [one.value(Clock(step, 1000), {}) for step in (0, 50, 100, 500)]
        assert values == pytest.approx([20, 12.5, 5, 5])
        assert [Schedule(20, 5, None, shape).value(Clock(s, 100), {}) for s in (0, 50, 100)] == pytest.approx([20, 12.5, 5])
    assert Schedule(20, 5).value(Clock(0, 0), {}) == 20  # before the run's length is known


def test_what_moves_is_the_part_named_also_inside_a_control() -> None:
    start = Objective(Inverted(TopK(5)))
    moving = MovingObjective(start, (Moved("gate", "verify_top_k", Schedule(9, 3, 4)),))
    assert [moving.at(Clock(s, 4), {}).gate for s in (0, 4)] == [Inverted(TopK(9)), Inverted(TopK(3))]
    assert moving.values(moving.at(Clock(4, 4), {})) == {"gate/verify_top_k": 3}
    assert MovingObjective(Objective(LabelRatio())).at(Clock(3, 4), {}) == Objective(LabelRatio())


@pytest.mark.parametrize("raises", [True, False])
@pytest.mark.parametrize("first", [0.01, 0.9])
def test_a_controller_finds_its_target_from_either_side(raises: bool, first: float) -> None:
    def rate(value: float) -> float:
        return value if raises else 1 - value

    mover, memory = HoldTAR(first, 0.7, 1e-3, 1.0, raises), {}
    for step in range(200):
        memory = mover.remember(Clock(step, 200), memory, Seen(1.0, rate(mover.value(Clock(step, 200), memory))))
    assert rate(mover.value(Clock(200, 200), memory)) == pytest.approx(0.7, abs=1e-3)


def test_a_controller_stays_within_its_bounds_and_comes_back_at_once() -> None:
    mover, memory = HoldTAR(5, 0.9, 1, 8, True), {}
    for _ in range(100):  # a target out of reach
        memory = mover.remember(Clock(0, 0), memory, Seen(1.0, 0.1))
    assert memory == {"value": 8}
    assert mover.remember(Clock(0, 0), memory, Seen(1.0, 1.0))["value"] < 8  # nothing was wound up
    assert mover.remember(Clock(0, 0), memory, Seen(1.0, None)) == memory  # a step without a verdict


def test_what_is_remembered_survives_json_bit_for_bit() -> None:
    start = Objective(Threshold(0.1))
    moving = MovingObjective(start, (Moved("gate", "threshold", HoldTAR(0.1, 0.6, 1e-3, 1, False)),))
    memories: dict[str, Memory] = {}
    for step in range(50):
        memories = moving.remember(Clock(step, 50), memories, Seen(1.0, (step * 0.37) % 1))
        assert json.loads(json.dumps(memories)) == memories
    assert moving.at(Clock(50, 50), json.loads(json.dumps(memories))) == moving.at(Clock(50, 50), memories)


def test_taids_pace_is_its_formula() -> None:
    """δ = (L' − L)/(L' + ε), m ← βm + (1 − β)δ, t ← min(end, max(linear, t + α·σ(m)·(1 − t)))."""
    mover, memory, losses = TAIDPace(0.4, 1.0, None, 0.2, 0.9), {}, [3.0, 2.0, 2.5, 1.0, 0.5, 0.4]
    t, momentum, before = 0.4, 0.0, None
    for step, loss in enumerate(losses):
        t = min(1.0, max(0.4 + 0.6 * step / 20, t))
        assert mover.value(Clock(step, 20), memory) == pytest.approx(t, rel=1e-12)
        memory = mover.remember(Clock(step, 20), memory, Seen(loss, None))
        if before is not None:
            momentum = 0.9 * momentum + 0.1 * (before - loss) / (before + 1e-15)
            t = t + 0.2 / (1 + math.exp(-momentum)) * (1 - t)
        before = loss
    assert t > 0.4 + 0.6 * len(losses) / 20  # it was ahead of the line
