"""The trust gate against its formula by hand, whatever the chunks and the order; and what it comes to at its ends."""

import math
from typing import Any

import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor

from speckd.config import GATES, MethodConfig
from speckd.errors import CapabilityError, ConfigError
from speckd.gates import LabelRatio, MatchedRandom, Random
from speckd.sequence_config import SequenceConfig
from speckd.teachers import TopKTeacher
from speckd.trust_gates import Trust
from speckd.types import BatchGate, TokenKeys
from tests.engine.test_ranked_gates import TOKENS, acceptance, batch, in_processes, truncated


def shares(ratios: list[float], priors: tuple[float, float], tokens: float) -> tuple[float, float]:
    """(not contradicted, explained better), the second by SciPy's minimiser."""
    sound = [r for r in ratios if r >= 1 / 20]

    def improbability(s: float) -> float:
        prior = tokens * (priors[1] * math.log(s) + (1 - priors[1]) * math.log(1 - s))
        return -prior - sum(math.log(s * r + 1 - s) for r in sound)

    best = minimize_scalar(improbability, bounds=(1e-12, 1 - 1e-12), method="bounded", options={"xatol": 1e-12}).x
    return (len(sound) + tokens * priors[0]) / (len(ratios) + tokens), best


def by_hand(ratios: list[float], samples: list[int], prior: float, tokens: float, per_sequence: bool) -> list[float]:
    whole = shares(ratios, (prior, prior), tokens)
    found = []
    for ratio, sample in zip(ratios, samples, strict=True):
        own = [r for r, s in zip(ratios, samples, strict=True) if s == sample]
        upright, skilled = shares(own, whole, tokens) if per_sequence else whole
        trust = upright * skilled**2 / (skilled**2 + (1 - skilled) ** 2)
        found.append(min(1.0, trust / (1 - trust) * ratio))
    return found


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_the_weight_is_the_formula(seed: int, per_sequence: bool) -> None:
    given, reference, (p, q, _) = batch(seed)
    labels, samples = given.rows.labels.tolist(), given.rows.keys.sample.tolist()
    ratios = [row_p[y] / row_q[y] for row_p, row_q, y in zip(p, q, labels, strict=True)]
    wanted = torch.tensor(by_hand(ratios, samples, 0.7, 5.0, per_sequence), dtype=torch.float64)
    gate = Trust(prior=0.7, prior_tokens=5.0, per_sequence=per_sequence)
    for chunk in (TOKENS, 16, 1):
        found = acceptance(gate, given, reference, chunk)
        assert torch.allclose(found.double(), wanted, rtol=1e-6, atol=0), chunk
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(acceptance(gate, given, reference, 7, given.rows.rows(order)), found[order], rtol=1e-9, atol=0)


def test_at_a_trust_of_a_half_it_is_the_label_ratio() -> None:
    given, reference, _ = batch(1)
    ratio = acceptance(LabelRatio(), given, reference, TOKENS)
    prior = brentq(lambda s: s * s**2 / (s**2 + (1 - s) ** 2) - 0.5, 0.5, 0.9)  # it drowns the data, and trust is a half
    half = acceptance(Trust(prior, 1e9), given, reference, TOKENS)
    assert torch.allclose(half, ratio, rtol=1e-5, atol=0)


def mean_weight(ratios: Tensor, **options: Any) -> Tensor:
    """By the first and the second half of the rows, which are two samples."""
    n = len(ratios) // 2
    keys = TokenKeys(torch.arange(2 * n) // n, torch.arange(2 * n) % n, 0, 0)
    return Trust(**options).select(ratios, keys).unflatten(0, (2, n)).mean(-1)


def test_three_kinds_of_teachers() -> None:
    """Simulated labels: a better teacher is followed, one broken at a quarter of the tokens there not, a worse one hardly."""
    draw = torch.Generator().manual_seed(0)
    wise, student, dull = (torch.randn(400, 50, generator=draw) * scale for scale in (3.0, 0.0, 0.0))
    student, dull = wise * 0.7 + torch.randn(400, 50, generator=draw), wise * 0.1
    label = torch.multinomial(wise.softmax(-1), 1, generator=draw)

    def ratio_of(teacher: Tensor, pupil: Tensor) -> Tensor:
        return (teacher.log_softmax(-1) - pupil.log_softmax(-1)).gather(-1, label)[:, 0].exp()

    better, worse = ratio_of(wise, student), ratio_of(dull, student)
    broken = torch.rand(400, generator=draw) < 0.25
    scrambled = better.where(~broken, 1e-4)
    assert float(mean_weight(better).mean()) > 0.95
    weights = Trust().select(scrambled, TokenKeys(torch.zeros(400).long(), torch.arange(400), 0, 0))
    assert float(weights[broken].mean()) < 0.01
    assert float(weights[~broken].mean()) > 0.8
    assert float(mean_weight(worse).mean()) < 0.3 < float(worse.clamp(max=1).mean())  # the label ratio believes it more


def test_a_sequence_where_the_teacher_is_wrong_is_trusted_less_than_its_neighbour() -> None:
    ratios = torch.tensor([0.001] * 19 + [0.5] + [1.2] * 19 + [0.5])
    keys = TokenKeys(torch.arange(40) // 20, torch.arange(40) % 20, 0, 0)
    whole, own = (Trust(per_sequence=each).select(ratios, keys) for each in (False, True))
    assert float(whole[19]) == float(whole[39]) and float(own[19]) < 0.5 < float(own[39])


@pytest.mark.parametrize("per_sequence", [False, True])
def test_ratios_at_their_ends_spoil_no_other_row(per_sequence: bool) -> None:
    """0, infinite and beyond half precision; sequences of one token; a batch of which nothing is left; and none at all."""
    gate = Trust(per_sequence=per_sequence)
    keys = TokenKeys(torch.tensor([0, 0, 0, 1, 2]), torch.arange(5), 0, 0)
    for dtype in (torch.float64, torch.float32, torch.float16):
        found = gate.select(torch.tensor([0.0, math.inf, 1.0, math.inf, 0.0], dtype=dtype), keys)
        assert (
            found.dtype == dtype and found.tolist()[0] == found.tolist()[4] == 0 and found.tolist()[1] == found.tolist()[3] == 1
        )
        assert 0 < float(found[2]) <= 1
        assert not gate.select(torch.zeros(5, dtype=dtype), keys).any()
    assert not len(gate.select(torch.zeros(0), keys.rows(torch.arange(0))))


@pytest.mark.parametrize("gate", [Trust(), Trust(per_sequence=True), MatchedRandom(Trust(prior=0.5))])
def test_several_processes_trust_as_one(gate: Any) -> None:
    given, reference, _ = batch(6)
    wanted = acceptance(gate, given, reference, 16)

    def work(rank: int, some: slice, gather: Any) -> Tensor:
        return acceptance(gate, given, reference, (16, 5, 3, 1)[rank], given.rows.rows(some), gather=gather)

    assert torch.allclose(in_processes([30, 0, 12, 1], work), wanted, rtol=1e-9, atol=0)


def test_a_random_gate_matches_its_mean_weight() -> None:
    given, reference, _ = batch(7)
    rate = float(acceptance(Trust(), given, reference, 16).mean())
    assert torch.equal(
        acceptance(MatchedRandom(Trust()), given, reference, 7), acceptance(Random(rate), given, reference, TOKENS)
    )


def test_a_truncated_teacher_is_trusted_by_its_labels_and_refused_without_them() -> None:
    given, reference, _ = batch(4)
    teacher = truncated(given, 6)
    wanted = acceptance(Trust(), given, reference, 16)
    assert torch.allclose(acceptance(Trust(), given, reference, 16, teacher=teacher), wanted, rtol=1e-9, atol=0)
    with pytest.raises(CapabilityError, match="label"):
        acceptance(Trust(), given, reference, 16, teacher=TopKTeacher(teacher.token_ids, teacher.log_probs, None))


@pytest.mark.parametrize("gate", [{"gate": "trust"}, {"gate": "matched_random", "gate_options": {"gate": "trust"}}])
def test_on_text_that_the_student_writes_it_is_refused(gate: dict[str, Any]) -> None:
    """Its labels bear the student out, whoever the teacher is: Σ q·log(p/q) is at most 0, so no share of p explains them."""
    objective = MethodConfig(**gate, rejected="mask").objective()
    with pytest.raises(ConfigError, match="trust: it is read off labels"):
        SequenceConfig(sequence_source="student").student_text_objective(objective)


def test_it_is_a_gate_of_whole_batches_that_a_setting_names() -> None:
    gate = MethodConfig(gate="trust", gate_options={"per_sequence": True}).objective().gate
    assert gate == Trust(per_sequence=True) and isinstance(gate, BatchGate) and "trust" in GATES
    for options, said in (
        ({"prior": 1.0}, "prior is 1.0"),
        ({"prior_tokens": 0.0}, "prior_tokens is 0"),
        ({"prior_tokens": math.inf}, "prior_tokens is inf"),
    ):
        with pytest.raises(ConfigError, match=said):
            MethodConfig(gate="trust", gate_options=options).objective()
