"""A real vocabulary: each divergence against float64 at V = 151,936 (every composition: `python -m tests.parity.large`)."""

import pytest
import torch

from speckd import Objective
from tests.parity.cases import DIVERGENCES, GATES, POLICIES
from tests.parity.large import KINDS, LIMITS, measured, problem

ROUNDS = list(zip(DIVERGENCES, GATES, [*POLICIES, *POLICIES, "mask"], strict=False))


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_at_a_real_vocabulary(kind: str, dtype: torch.dtype) -> None:
    given = problem(151_936, 6, dtype)
    for divergence, gate, policy in ROUNDS:
        error = measured(given, Objective(GATES[gate], POLICIES[policy], DIVERGENCES[divergence]), kind, dtype)
        assert error <= LIMITS[dtype], (divergence, gate, policy, error)
