"""MBPP's own solutions pass, every one of them; changed ones fail, or give what the reference gives.

By default every eighth row, with one mutant each. SPECKD_ALL_MBPP=1: all 474 rows and up to six mutants each; some minutes.
"""

import os
from typing import Any

import pytest

from speckd.box import Box, Limits, judge, problem, unjudgeable
from speckd.box.equality import equal
from tests.box.mutants import mutants

ALL = bool(os.environ.get("SPECKD_ALL_MBPP"))
EVERY, MUTANTS = (1, 6) if ALL else (8, 1)
pytestmark = pytest.mark.timeout(7200 if ALL else 300)


@pytest.fixture(scope="module")
def roomy(box: Box) -> Box:
    return Box(Limits())


def test_every_row_can_be_judged(mbpp: list[dict[str, Any]]) -> None:
    assert len(mbpp) == 474
    assert [(row["task_id"], why) for row in mbpp if (why := unjudgeable(problem(row, challenge=True)))] == []


def test_the_reference_passes(mbpp: list[dict[str, Any]], roomy: Box) -> None:
    rows = mbpp[::EVERY]
    if not ALL:
        print(f"{len(mbpp) - len(rows)} of {len(mbpp)} rows are NOT run: set SPECKD_ALL_MBPP=1")
    failed = [(row["task_id"], v.reason) for row in rows if not (v := judge(problem(row, True), row["code"], roomy)).passed]
    assert failed == []


def test_a_changed_reference_fails_or_is_equal(mbpp: list[dict[str, Any]], box: Box) -> None:
    """A mutant that passes must give the reference's own values in every call: then the tests cannot tell them apart."""
    killed, equivalent, wrong = 0, [], []
    for row in mbpp[3::EVERY]:
        found = list(mutants(row["code"]))
        for what, program in found[:: max(1, len(found) // MUTANTS)][:MUTANTS]:
            given = problem(row)
            verdict = judge(given, program, box)
            if not verdict.passed:
                killed += 1
                continue
            reference = box.run(row["code"], given.calls(), given.setup)
            same = all(equal(a.value, b.value) for a, b in zip(verdict.outcomes, reference, strict=True))
            (equivalent if same else wrong).append(f"task {row['task_id']}, {what}")
    print(f"mutants killed: {killed} of {killed + len(equivalent) + len(wrong)}; equal to the reference on all tests:")
    print("\n".join(equivalent))
    assert wrong == [] and killed > 2 * len(equivalent)
