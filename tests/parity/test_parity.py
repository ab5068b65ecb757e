"""Loss and gradients of every gate × policy × divergence × teacher × execution against the independent oracle."""

import pytest
import torch

from speckd.reference import speckd_loss
from tests.parity import cases, oracle
from tests.parity.cases import (
    EXECUTIONS,
    GATES,
    TEACHERS,
    by_oracle,
    by_package,
    compositions,
    problem,
    relative_error,
    setting,
)

LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4}


def require_parity(given: cases.Problem, chosen: oracle.Setting, top: int | None) -> None:
    wanted = by_oracle(given, chosen, top)
    for dtype, limit in LIMITS.items():
        for name, chunk in EXECUTIONS.items():
            loss, gradients = relative_error(by_package(given, chosen, top, chunk, dtype), wanted)
            assert loss <= limit, (chosen.gate, chosen.rejected, chosen.divergence, top, name, dtype, loss)
            assert gradients <= limit, (chosen.gate, chosen.rejected, chosen.divergence, top, name, dtype, gradients)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("teacher", TEACHERS)
def test_every_policy_and_divergence(gate: str, teacher: str) -> None:
    given = problem(seed=3)
    for _, rejected, divergence in compositions(gate):
        require_parity(given, setting(given, gate, rejected, divergence), TEACHERS[teacher])


@pytest.mark.parametrize("divergence", cases.DIVERGENCES)
@pytest.mark.parametrize("rejected", cases.POLICIES)
def test_temperature_label_share_and_normalizer(divergence: str, rejected: str) -> None:
    given = problem(seed=5)
    for normalizer in ("valid", "weight"):
        more = {"temperature": 2.5, "label_loss_weight": 0.3, "normalizer": normalizer}
        require_parity(given, setting(given, "top_k", rejected, divergence, **more), None)
        more["temperature"] = 1.0
        require_parity(given, setting(given, "label_ratio", rejected, divergence, **more), TEACHERS["top-K"])


@pytest.mark.parametrize("teacher", TEACHERS)
@pytest.mark.parametrize("rejected", cases.POLICIES)
def test_a_batchs_coefficient_and_a_gated_label(rejected: str, teacher: str) -> None:
    given = problem(seed=6)
    for divergence in cases.OF_BATCH_OR_LABEL:
        for gate in ("none", "top_k", "label_ratio", "matched_random"):
            require_parity(given, setting(given, gate, rejected, divergence), TEACHERS[teacher])
        more = {"label_loss_weight": 0.3, "normalizer": "weight"}
        require_parity(given, setting(given, "label_ratio", rejected, divergence, **more), TEACHERS[teacher])
    require_parity(given, setting(given, "top_k", rejected, "lk_hybrid", temperature=2.5), None)


@pytest.mark.parametrize("seed", range(6))
def test_other_batches(seed: int) -> None:
    given = problem(seed=10 + seed, tokens=1 + 3 * seed, vocabulary=8 + 5 * seed, sharpness=0.3 + seed)
    for gate in GATES:
        require_parity(given, setting(given, gate, "label", "forward_kl"), None)


def test_a_vocabulary_of_thousands() -> None:
    given = problem(seed=2, tokens=3, vocabulary=3000)
    for divergence in ("forward_kl", "generalized_jsd", "reverse_kl"):
        require_parity(given, setting(given, "top_k", "label", divergence), None)
        require_parity(given, setting(given, "spec", "residual", divergence), 32)


@pytest.mark.parametrize("rejected_weight", [0.0, 0.01])
@pytest.mark.parametrize("gate", ["top_k", "spec"])
def test_the_paper_on_one_screen_is_the_same(gate: str, rejected_weight: float) -> None:
    given = problem(seed=7, tokens=12)
    chosen = setting(given, gate, "down_weight", "forward_kl", beta=rejected_weight)
    student = (given.hidden @ given.weight.T + given.bias)[None].requires_grad_()
    supervised = torch.ones(1, 12, dtype=torch.bool)
    draws = chosen.uniforms[None] if gate == "spec" else None
    loss, _ = speckd_loss(student, given.teacher[None], supervised, cases.K, rejected_weight, uniforms=draws)
    total, count = oracle.loss(student[0], given.teacher, given.rows.labels.tolist(), chosen, None)
    assert float(loss) == pytest.approx(float(total / count), rel=1e-9)
    found, wanted = (torch.autograd.grad(value, student)[0] for value in (loss, total / count))
    assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-12)
