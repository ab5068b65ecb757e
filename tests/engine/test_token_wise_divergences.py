"""Divergences that depend on the batch and the token: AdaKD's temperature and ATKD's two ways, against the papers' formulas."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from speckd import LMHead, Objective, distillation_loss
from speckd.adaptive_teaching import AdaptiveTeaching, SplitTeaching, decoupled
from speckd.config import MethodConfig
from speckd.divergences import forward_kl, reverse_kl
from speckd.errors import CapabilityError, ConfigError
from speckd.gates import NoGate, TopK
from speckd.policies import Label, Mask, Residual
from speckd.ranked_gates import HellingerDistance
from speckd.teachers import DenseTeacher, TopKTeacher
from speckd.teachers.source import require_answers
from speckd.token_temperature import TokenTemperature
from speckd.types import Capabilities
from tests.engine.test_ranked_gates import TOKENS, in_processes, truncated
from tests.parity.cases import Problem, problem, relative_error


def hellinger(p: Tensor, q: Tensor) -> float:
    return math.sqrt(sum((math.sqrt(a) - math.sqrt(b)) ** 2 for a, b in zip(p.tolist(), q.tolist(), strict=True)) / 2)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return sum((p[v] * torch.log(p[v] / q[v]) for v in range(len(p))), torch.zeros((), dtype=torch.float64))


def softmax(logits: Tensor, tau: float = 1.0) -> Tensor:
    powers = (logits / tau - (logits / tau).max()).exp()
    return powers / powers.sum()


def adakd(teacher: Tensor, student: Tensor, labels: list[int], kept: float, reverse: bool) -> Tensor:
    """2510.11615: tau_i = tau_0·exp(-c·tanh(log(s_i/median(s)))), c = 0.5, of the selected tokens; loss tau_i²·D."""
    s = [hellinger(softmax(p), softmax(q.detach())) for p, q in zip(teacher, student, strict=True)]
    chosen = sorted(range(len(s)), key=lambda i: -s[i])[: math.ceil(kept * len(s))]
    ordered = sorted(s[i] for i in chosen)
    median = ordered[(len(ordered) - 1) // 2]
    total = torch.zeros((), dtype=torch.float64)
    for i in chosen:
        tau = math.exp(-0.5 * math.tanh(math.log(s[i] / median)))
        p, q = softmax(teacher[i], tau), softmax(student[i], tau)
        total = total + tau**2 * (kl(q, p) if reverse else kl(p, q))
    return total


def atkd(teacher: Tensor, student: Tensor, labels: list[int]) -> Tensor:
    """2402.11890: u = 1 - p(y); easy: λ·KL_nontarget; hard, top 50 %: (1 - λ)·(KL_binary + KL_nontarget); λ = 0.2."""
    u = [1 - float(softmax(p)[y]) for p, y in zip(teacher, labels, strict=True)]
    hard = sorted(range(len(u)), key=lambda i: -u[i])[: math.ceil(len(u) / 2)]
    total = torch.zeros((), dtype=torch.float64)
    for i, y in enumerate(labels):
        p, q = softmax(teacher[i]), softmax(student[i])
        others = [v for v in range(len(p)) if v != y]
        rest = kl(p[others] / p[others].sum(), q[others] / q[others].sum())
        binary = kl(torch.stack([p[y], p[others].sum()]), torch.stack([q[y], q[others].sum()]))
        total = total + (0.8 * (binary + rest) if i in hard else 0.2 * rest)
    return total


CASES: dict[str, tuple[Objective, Any]] = {
    "all tokens": (Objective(NoGate(), Mask(), TokenTemperature()), lambda t, s, y: adakd(t, s, y, 1.0, False)),
    "AdaKD": (
        Objective(HellingerDistance(0.5), Mask(), TokenTemperature(reverse_kl, fraction=0.5)),
        lambda t, s, y: adakd(t, s, y, 0.5, True),
    ),
    "ATKD": (Objective(NoGate(), Mask(), AdaptiveTeaching()), atkd),
}


def by_engine(given: Problem, objective: Objective, dtype: torch.dtype, chunk: int, teacher: Any = None) -> list[Tensor]:
    hidden, *head = (t.to(dtype).requires_grad_() for t in (given.hidden, given.weight, given.bias))
    teacher = teacher or DenseTeacher(given.teacher.to(dtype))
    output = distillation_loss(objective, hidden, LMHead(*head), teacher, given.rows, chunk)
    return [output.sum.detach(), *torch.autograd.grad(output.sum, (hidden, *head))]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_loss_and_gradients_are_the_papers(case: str, seed: int) -> None:
    given = problem(seed=20 + seed, tokens=13 + seed)
    objective, oracle = CASES[case]
    leaves = [t.clone().requires_grad_() for t in (given.hidden, given.weight, given.bias)]
    loss = oracle(given.teacher, leaves[0] @ leaves[1].T + leaves[2], given.rows.labels.tolist())
    wanted = [loss.detach(), *torch.autograd.grad(loss, leaves)]
    for dtype, limit in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        for chunk in (100, 4, 1):
            assert max(relative_error(by_engine(given, objective, dtype, chunk), wanted)) < limit, (case, dtype, chunk)
    whole = truncated(given, 17)
    assert max(relative_error(by_engine(given, objective, torch.float64, 5, whole), wanted)) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_policies_that_go_by_definition_give_the_same(case: str) -> None:
    """`Residual` sends whole rows through `token_terms`; with everything accepted that is the loss itself."""
    given = problem(seed=30, tokens=14)
    objective, _ = CASES[case]
    for policy in (Label(), Residual()):
        own = Objective(NoGate(), policy, objective.divergence)
        found, wanted = (by_engine(given, one, torch.float64, 4) for one in (own, Objective(NoGate(), Mask(), own.divergence)))
        assert max(relative_error(found, wanted)) < 1e-12
    half = by_engine(given, Objective(TopK(3), Residual(), objective.divergence), torch.float64, 4)
    again = by_engine(given, Objective(TopK(3), Residual(), objective.divergence), torch.float64, 14, truncated(given, 17))
    assert max(relative_error(half, again)) < 1e-9


@pytest.mark.parametrize("case", CASES)
def test_the_batch_is_that_of_all_processes(case: str) -> None:
    given = problem(seed=31, tokens=TOKENS)
    objective, _ = CASES[case]
    head, teacher = LMHead(given.weight, given.bias), DenseTeacher(given.teacher)
    wanted = distillation_loss(objective, given.hidden, head, teacher, given.rows).terms.loss

    def work(rank: int, some: slice, gather: Any) -> Tensor:
        own = given.rows.rows(some)
        return distillation_loss(objective, given.hidden, head, teacher, own, 7, gather=gather).terms.loss

    assert torch.allclose(in_processes([20, 0, 23], work), wanted, rtol=1e-12, atol=0)


def test_the_decoupled_parts_add_up_to_the_divergence() -> None:
    """KL(p ‖ q) = B + (1 − p(y))·R; zeros on either side are borne, in the gradient as well."""
    generator = torch.Generator().manual_seed(0)
    q, p = (torch.randn(50, 9, generator=generator).double().mul_(3).log_softmax(-1) for _ in range(2))
    labels = torch.randint(9, (50,), generator=generator)
    binary, rest = decoupled(q, p, labels)
    left = 1 - p.exp().gather(-1, labels[:, None])[:, 0]
    assert torch.allclose(binary + left * rest, forward_kl(q, p), rtol=1e-9)
    sure = torch.full((1, 3), -torch.inf).double()
    sure[0, 0] = 0.0
    student = torch.randn(1, 3, generator=generator).double().requires_grad_()
    for label, teacher in ((0, sure), (1, sure), (0, torch.tensor([[0.5, 0.0, 0.5]]).double().log())):
        value = SplitTeaching(0.2, -1.0).at(torch.tensor([label]))(student.log_softmax(-1), teacher)
        (slope,) = torch.autograd.grad(value.sum(), student)
        assert torch.isfinite(value).all() and torch.isfinite(slope).all()


def test_equal_models_have_one_temperature_and_no_loss() -> None:
    given = problem(seed=32, tokens=6)
    same = DenseTeacher(given.hidden @ given.weight.T + given.bias)
    found = by_engine(given, CASES["all tokens"][0], torch.float64, 4, same)
    assert abs(float(found[0])) < 1e-12 and all(torch.isfinite(g).all() for g in found)


@pytest.mark.parametrize("divergence", [TokenTemperature(), AdaptiveTeaching()])
def test_a_truncated_teacher_is_refused(divergence: Any) -> None:
    given = problem(seed=33, tokens=6)
    best = given.teacher.log_softmax(-1).topk(5)
    objective = Objective(NoGate(), Mask(), divergence)
    what = f"{type(divergence).__name__} needs the whole of the teacher's distribution, but the teacher gives its top 5 only"
    with pytest.raises(CapabilityError, match=what):
        by_engine(given, objective, torch.float64, 4, TopKTeacher(best.indices, best.values))
    with pytest.raises(CapabilityError, match=what):
        require_answers(objective, Capabilities(top_k=5), 17)
    require_answers(objective, Capabilities(), 17)


def test_names_and_options() -> None:
    made = MethodConfig(divergence="token_temperature", divergence_options={"divergence": "reverse_kl", "fraction": 0.5})
    assert made.objective().divergence == TokenTemperature(reverse_kl, fraction=0.5)
    made = MethodConfig(divergence="adaptive_teaching", divergence_options={"easy_weight": 0.3})
    assert made.objective().divergence == AdaptiveTeaching(0.3)
    for options, said in (
        ({"divergence": "adaptive_teaching"}, "no divergence of tokens one by one"),
        ({"divergence": "forward"}, "'forward' is not a divergence"),
        ({"fraction": 0.0}, "fraction is 0.0"),
        ({"base": 0.0}, "base is 0.0"),
    ):
        with pytest.raises(ConfigError, match=said):
            MethodConfig(divergence="token_temperature", divergence_options=options).objective()
    with pytest.raises(ConfigError, match=r"easy_weight is 2\.0"):
        AdaptiveTeaching(2.0)
