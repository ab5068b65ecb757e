"""docs/theory.md, held: its bounds on random pairs, its counterexamples by their numbers, its proofs where countable."""

import itertools

import pytest
import torch
from benchmarks.theory import bounds, convergence, monotone, smoothness, variance
from benchmarks.theory.model import (
    DIVERGENCES,
    GATES,
    Linear,
    acceptance,
    distance,
    distributions,
    generator,
    look,
    rows_of,
    slopes,
    values,
)

from speckd.divergences import forward_kl
from speckd.gates import ExpectedSpec, NoGate, TopK
from speckd.objective import Objective
from speckd.policies import DownWeight, Mask

EACH = pytest.mark.parametrize("name", sorted(DIVERGENCES))
#: Those of which the page proves that Spec's expected acceptance never falls along tabular flow.
PROVED = {"forward_kl", "total_variation", "lk_alpha", "lk_hybrid"}


def logs(*rows: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_spec_k_accepts_with_one_less_tv_to_the_k(k: int) -> None:
    """Every tuple of candidates, each accepted with its own probability: enumerated, beside the package's expected gate."""
    source = generator(1)
    student, teacher = distributions(20, 4, source), distributions(20, 4, source)
    q, p = student.softmax(-1), teacher.softmax(-1)
    rejected = 1 - (p / q).clamp(max=1)
    total = torch.zeros(20, dtype=torch.float64)
    for drawn in itertools.product(range(4), repeat=k):
        total += q[:, drawn].prod(-1) * (1 - rejected[:, drawn].prod(-1))
    assert torch.allclose(total, 1 - distance(student, teacher) ** k, atol=1e-12)
    assert torch.allclose(total, ExpectedSpec(k)(rows_of(student, teacher)), atol=1e-12)


@EACH
def test_a_small_divergence_promises_acceptance(name: str) -> None:
    student, teacher = bounds.pairs(4_000, seed=2)
    bound = bounds.BOUNDS[name](values(DIVERGENCES[name], student, teacher).clamp(min=0))
    slack = bound - distance(student, teacher)
    assert slack.min() > (-1e-4 if name == "lk_hybrid" else -1e-9)  # lk_hybrid's is read off a grid


def test_bounds_of_spec_k_on_average() -> None:
    """E[1 − TV] ≥ 1 − √(E[KL]/2), and from two candidates on E[1 − TV^k] ≥ 1 − E[KL]/2."""
    student, teacher = bounds.pairs(6_000, seed=3)
    kl, far = (each.view(-1, 6) for each in (values(forward_kl, student, teacher), distance(student, teacher)))
    mean = kl.mean(-1).clamp(min=0)
    assert ((1 - far).mean(-1) >= 1 - (mean / 2).sqrt() - 1e-9).all()
    for k in (2, 5):
        assert ((1 - far**k).mean(-1) >= 1 - mean / 2 - 1e-9).all()


def test_the_constant_of_alpha_beta() -> None:
    assert bounds.alpha_beta_constant() >= bounds.ALPHA_BETA - 1e-12


def test_todis_value_is_jeffreys_and_its_gradient_is_not() -> None:
    student, teacher = (distributions(50, 6, generator(seed)) for seed in (4, 5))
    p, q = teacher.log_softmax(-1), student.log_softmax(-1)
    jeffreys = ((p.exp() - q.exp()) * (p - q)).sum(-1)
    assert torch.allclose(values(DIVERGENCES["todi"], student, teacher), jeffreys, rtol=1e-10)
    z = student.clone().requires_grad_()
    log_q = z.log_softmax(-1)
    (slope,) = torch.autograd.grad(((p.exp() - log_q.exp()) * (p - log_q)).sum(), z)
    assert not torch.allclose(slope, slopes(DIVERGENCES["todi"], student, teacher), rtol=0.1)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k_is_certain_inside_the_teachers_radius_and_not_outside(k: int) -> None:
    found = bounds.certificate(3_000)[str(k)]
    assert found["inside"] > 100
    assert found["rejected_inside"] == 0
    assert found["just_outside_rejected"] == 1 and found["just_outside_gap"] < 1e-5


def test_the_gap_at_rank_k_is_not_what_counts() -> None:
    found = bounds.example()
    assert found["boundary"] == pytest.approx([0, 0], abs=1e-12)
    assert found["radius"] == pytest.approx([0.35, 0.005])


@EACH
def test_tabular_flow_never_loses_a_top_k_verdict(name: str) -> None:
    """At a tie of the student's two best tokens, the one that the teacher prefers pulls away (kinked ones may stand still)."""
    for vocabulary in (2, 3, 8):
        assert monotone.top_k_rate(DIVERGENCES[name], 4_000, vocabulary, seed=6).min() > -1e-12


@pytest.mark.parametrize("name", sorted(PROVED))
def test_tabular_flow_never_lowers_specs_acceptance(name: str) -> None:
    for vocabulary in (2, 3, 8):
        source = generator(7)
        student, teacher = distributions(4_000, vocabulary, source), distributions(4_000, vocabulary, source)
        assert monotone.speculative_rate(DIVERGENCES[name], student, teacher).min() > -1e-12


@pytest.mark.parametrize("name", sorted(set(DIVERGENCES) - {"alpha_beta"}))
def test_the_natural_gradient_never_lowers_specs_acceptance(name: str) -> None:
    """Of a function of q/p alone that is convex, and of what mixes such by one share a row; ABKD's is no such function."""
    source = generator(13)
    student, teacher = distributions(4_000, 8, source), distributions(4_000, 8, source)
    assert monotone.natural_rate(DIVERGENCES[name], student, teacher).min() > -1e-9


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [
        ("reverse_kl", (0.76, 0.04, 0.20), (0.71, 0.28, 0.01)),
        ("adaptive_kl", (0.76, 0.04, 0.20), (0.71, 0.28, 0.01)),
        ("generalized_jsd", (0.01, 0.17, 0.82), (0.18, 0.01, 0.81)),
        ("skewed_reverse_kl", (0.01, 0.17, 0.82), (0.18, 0.01, 0.81)),
        ("alpha_beta", (0.01, 0.17, 0.82), (0.18, 0.01, 0.81)),
        ("todi", (0.01, 0.17, 0.82), (0.18, 0.01, 0.81)),
        ("skewed_forward_kl", (0.003, 0.222, 0.775), (0.203, 0.025, 0.772)),
    ],
)
def test_where_specs_acceptance_falls_along_tabular_flow(name: str, student: tuple, teacher: tuple) -> None:
    """The derivative says so, and so does a small step."""
    z, t = logs(student), logs(teacher)
    assert monotone.speculative_rate(DIVERGENCES[name], z, t) < -5e-5
    assert distance(z - 1e-3 * slopes(DIVERGENCES[name], z, t), t) > distance(z, t)


def test_forward_kl_lowers_the_label_ratios_own_rate() -> None:
    z, t = logs((0.66, 0.03, 0.31)), logs((0.01, 0.69, 0.30))
    assert monotone.label_rate(forward_kl, z, t) < -0.1


def test_a_step_of_two_keeps_top_k_under_forward_kl_and_a_longer_one_may_not() -> None:
    z, t = torch.tensor([[0.1, 0.0]], dtype=torch.float64), logs((0.501, 0.499))
    slope = slopes(forward_kl, z, t)
    assert TopK(1)(rows_of(z - 2.0 * slope, t)) == 1
    assert TopK(1)(rows_of(z - 2.5 * slope, t)) == 0
    source = generator(8)
    z, t = distributions(5_000, 4, source), distributions(5_000, 4, source)
    before, after = TopK(1)(rows_of(z, t)), TopK(1)(rows_of(z - 2.0 * slopes(forward_kl, z, t), t))
    assert before.sum() > 100 and (after >= before).all()


def test_two_contexts_that_share_their_logits_lose_one_under_the_papers_gate() -> None:
    found = monotone.shared_example(length=200)
    assert found["gated"]["tar"][0] == 1 and found["gated"]["tar"][-1] == 0.5
    falls = [a > b for a, b in itertools.pairwise(found["gated"]["tar"])]
    assert sum(falls) == 1
    lost = [row[1] for row in found["gated"]["kl"]]
    assert lost[-1] > 2 * lost[0]  # and no gradient brings it back
    assert found["ungated"]["kl"][-1][1] < found["ungated"]["kl"][0][1]


def test_three_contexts_two_parameters_top_1() -> None:
    found = monotone.linear_example(length=200)
    assert found["gated"]["tar"][0] == 1
    assert found["gated"]["tar"][-1] == pytest.approx(2 / 3)


@EACH
def test_a_rejected_context_of_its_own_never_moves(name: str) -> None:
    source = generator(9)
    z, t = distributions(200, 6, source), distributions(200, 6, source)
    rejected = TopK(1)(rows_of(z, t)) == 0
    assert rejected.any()
    assert (look(Objective(TopK(1), Mask(), DIVERGENCES[name]), z, t).gradient[rejected] == 0).all()
    down_weighed = look(Objective(TopK(1), DownWeight(0.01), DIVERGENCES[name]), z, t).gradient
    assert torch.allclose(down_weighed[rejected], 0.01 * slopes(DIVERGENCES[name], z, t)[rejected], rtol=1e-9, atol=1e-15)


def test_masked_descent_keeps_its_rate_exactly() -> None:
    source = generator(10)
    start, t = distributions(200, 6, source), distributions(200, 6, source)
    z, objective = start, Objective(TopK(2), Mask(), forward_kl)
    for _ in range(100):
        z = z - 2.0 * look(objective, z, t).gradient
    assert torch.equal(TopK(2)(rows_of(z, t)), TopK(2)(rows_of(start, t)))


def test_labels_of_a_good_teacher_end_starvation_and_wrong_ones_do_not() -> None:
    found = convergence.label_fallback(rows=40, length=200)
    assert found["labels_of_the_teacher"]["tar_end"] == 1
    assert found["labels_wrong"]["tar_end"] == found["tar_start"] < 1


def test_a_sure_student_escapes_forward_kl_in_linear_and_reverse_kl_in_exponential_time() -> None:
    found = convergence.escape(length=300, only=("forward_kl", "reverse_kl", "forward_kl, Top-1 mask"))
    assert found["forward_kl"][-1] < 20
    assert found["reverse_kl"][4] > 4 * found["reverse_kl"][3] > 12 * found["reverse_kl"][2] / 4
    assert found["forward_kl, Top-1 mask"][-1] == 300


def test_local_rates() -> None:
    found = convergence.local_rates()
    wanted = {"forward_kl": 1, "reverse_kl": 1, "generalized_jsd": 0.25, "skewed_forward_kl": 0.81, "skewed_reverse_kl": 0.81}
    for name, rate in (wanted | {"adaptive_kl": 1, "todi": 1.5}).items():
        assert found[name] == pytest.approx(rate, rel=1e-5)


def test_moments_are_those_of_enumeration() -> None:
    """Against a loop over all batches and verdicts of one small problem."""
    gradients = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0]]], dtype=torch.float64)
    rates = [0.2, 0.5, 1.0]
    weights = variance.Weights(
        torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 3, 2),
        torch.tensor([[[r, 1 - r] for r in rates]], dtype=torch.float64),
    )
    for normalizer in ("valid", "weight"):
        drawn = []
        for (i, j), a, b in itertools.product(itertools.product(range(3), repeat=2), (0, 1), (0, 1)):
            chance = (rates[i] if a else 1 - rates[i]) * (rates[j] if b else 1 - rates[j]) / 9
            count = 2 if normalizer == "valid" else max(a + b, 1)
            drawn.append((chance, (a * gradients[0, i] + b * gradients[0, j]) / count))
        mean = sum(chance * value for chance, value in drawn)
        spread = sum(chance * (value - mean).square().sum() for chance, value in drawn)
        own = variance.moments(gradients, weights, normalizer)
        assert torch.allclose(own[0][0], mean) and torch.allclose(own[1][0], spread)


def test_a_mask_can_make_noise_where_there_was_none() -> None:
    found = variance.example()
    assert found["gated"] > 300 * found["ungated"] > 0


def test_drawing_spec_adds_exactly_the_variance_of_its_verdicts() -> None:
    """Batches of two, denominator of two: half the mean over contexts of a(1 − a)·|g|², beside the expected gate's."""
    source = generator(11)
    features = torch.randn(5, 4, 2, generator=source, dtype=torch.float64)
    problem = Linear(features, distributions(20, 3, source))
    student = distributions(20, 3, source)
    gradients = (features[..., None] * slopes(forward_kl, student, problem.teacher).view(5, 4, 1, -1)).flatten(2)
    drawn, expected = (
        variance.moments(gradients, variance.weights_of(gate, problem, student), "valid")
        for gate in ("spec_1", "expected_spec_1")
    )
    rate = 1 - distance(student, problem.teacher).view(5, 4)
    assert torch.allclose(drawn[0], expected[0])
    assert torch.allclose(drawn[1] - expected[1], (rate * (1 - rate) * gradients.square().sum(-1)).mean(-1) / 2)


def test_curvature_is_bounded_for_forward_kl_and_not_for_reverse_kl() -> None:
    found = smoothness.sharpness(rows=400)
    assert max(found["forward_kl"]["all"]) <= 0.5 + 1e-9
    for name in ("reverse_kl", "adaptive_kl", "todi"):
        assert found[name]["accepted"][-1] > 5 * found[name]["accepted"][0]
    for name in ("generalized_jsd", "skewed_forward_kl", "skewed_reverse_kl", "total_variation", "lk_alpha", "lk_hybrid"):
        assert max(found[name]["all"]) < 1


def test_a_mask_flattens_forward_kl_as_a_smaller_step_would() -> None:
    """Fewer terms of a sum of positive matrices: never steeper, and about as flat as the share that is kept."""
    found = smoothness.masked_curvature(problems=60)
    assert found["forward_kl"]["steeper"] == 0
    assert found["forward_kl"]["ratio"] == pytest.approx(found["forward_kl"]["accepted"], abs=0.1)
    assert found["reverse_kl"]["steeper"] > 0


@EACH
def test_the_masked_loss_jumps_by_the_whole_divergence_where_a_verdict_flips(name: str) -> None:
    found = smoothness.jumps(rows=500)[name]
    assert found["mask"]["least"] > 0
    assert found["ungated"] < 1e-6
    assert found["down_weight"]["median"] == pytest.approx(0.99 * found["mask"]["median"], rel=1e-3)


def test_the_study_sees_the_gates_that_the_package_ships() -> None:
    """Beside a formula of its own: the label ratio's rate over labels of the teacher, E_{y~p} min(1, p(y)/q(y))."""
    source = generator(12)
    student, teacher = distributions(30, 5, source), distributions(30, 5, source)
    p, q = teacher.softmax(-1), student.softmax(-1)
    assert torch.allclose(acceptance(GATES["label_ratio"], student, teacher), (p * (p / q).clamp(max=1)).sum(-1))
    plain = look(Objective(NoGate(), Mask(), forward_kl), student, teacher)
    assert torch.allclose(plain.gradient, q - p, atol=1e-12)
