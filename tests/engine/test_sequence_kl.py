"""The reverse KL of whole texts: its gradient is the exact one on average, and the engine's is that of its formula."""

from itertools import product

import pytest
import torch
from torch import Tensor

from speckd import LMHead, Objective, distillation_loss
from speckd.errors import ConfigError
from speckd.gates import NoGate, TopK
from speckd.objective import token_terms
from speckd.policies import DownWeight, Mask, Residual
from speckd.sequence_kl import SequenceReverseKL
from speckd.support import shared_support
from speckd.teachers.in_process import HiddenTeacher
from speckd.tokens import SupervisedRows
from speckd.types import Rows, TokenKeys
from tests.parity.cases import Problem, problem, teacher_rows


def test_on_average_over_the_students_texts_it_is_the_gradient_of_the_texts_divergence() -> None:
    """Every text of three tokens of a vocabulary of three, weighed by its probability: ∇ Σ_y q(y) log(q(y)/p(y))."""
    size, length = 3, 3
    texts = list(product(range(size), repeat=length))
    prefixes = {prefix: i for i, prefix in enumerate(p for n in range(length) for p in product(range(size), repeat=n))}
    torch.manual_seed(0)
    student, teacher = torch.randn(2, len(prefixes), size, dtype=torch.float64)
    student.requires_grad_()
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    at = torch.tensor([[prefixes[text[:t]] for t in range(length)] for text in texts])
    labels = torch.tensor(texts)
    own, other = log_q[at, labels], log_p[at, labels]  # [texts, length]
    chance = own.sum(-1).exp()
    (wanted,) = torch.autograd.grad((chance * (own.sum(-1) - other.sum(-1))).sum(), student, retain_graph=True)
    sample = torch.arange(len(texts)).repeat_interleave(length)
    keys = TokenKeys(sample, torch.arange(length).repeat(len(texts)))
    divergence = SequenceReverseKL(length_normalized=False)
    found = divergence.policy_gradient(own.detach().flatten(), other.flatten(), keys)
    flat = divergence(log_q[at.flatten()], log_p[at.flatten()])
    loss = (chance.detach() * found.of(flat, own.flatten()).view(-1, length).sum(-1)).sum()
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.allclose(gradient, wanted, rtol=1e-12, atol=1e-14)


def formula(given: Problem, divergence: SequenceReverseKL, values: Tensor, own: Tensor, other: Tensor) -> Tensor:
    """[N] losses, each row for itself; `values`: KL(q ‖ p) on the support; `own`, `other`: log-probabilities of the labels."""
    keys, losses, a = given.rows.keys, [], divergence.teacher_mix
    for i in range(len(own)):
        later = (keys.sample == keys.sample[i]) & (keys.position > keys.position[i])
        rewards = (other - own).detach()[later]
        gain = float(rewards.sum()) / (max(len(rewards), 1) if divergence.length_normalized else 1)
        q, p = float(own[i].detach().exp()), float(other[i].exp())
        w = q / (a * p + (1 - a) * q)
        if divergence.clip_range and ((gain > 0 and w > 1.2) or (gain < 0 and w < 0.8)):
            gain = 0.0
        losses.append(w * (values[i] - gain * own[i]))
    return torch.stack(losses)


@pytest.mark.parametrize(
    "divergence", [SequenceReverseKL(teacher_mix=0.3), SequenceReverseKL(False, 0.0), SequenceReverseKL(clip_range=0)]
)
@pytest.mark.parametrize("top", [None, 6])
def test_the_engine_gives_the_formula_in_any_chunks_and_order(divergence: SequenceReverseKL, top: int | None) -> None:
    given = problem(seed=3)
    order = torch.randperm(len(given.rows), generator=torch.Generator().manual_seed(1))
    for gate, rejected in ((NoGate(), Mask()), (TopK(5), DownWeight(0.01)), (TopK(5), Mask()), (TopK(5), Residual())):
        objective = Objective(gate, rejected, divergence)
        leaves = [t.clone().requires_grad_() for t in (given.hidden, given.weight, given.bias)]
        logits = leaves[0] @ leaves[1].T + leaves[2]
        signal = teacher_rows(given, top, torch.float64).signal(given.rows.index)
        labels, keys = given.rows.labels, given.rows.keys
        accepted = gate(Rows(logits.detach(), signal, labels, keys))
        support = shared_support(logits, signal, 1.0)
        own = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        losses = formula(given, divergence, divergence(*support), own, signal.label_log_prob(labels))
        on, fallen = rejected.weights(accepted)
        total = (on * losses).sum()
        if isinstance(rejected, Residual):
            plain = token_terms(Objective(gate, rejected), Rows(logits, signal, labels, keys), torch.zeros_like(accepted))
            assert bool((fallen == 1 - accepted).all())
            total = total + (fallen * plain.loss).sum()
        wanted = [total.detach(), *torch.autograd.grad(total, leaves)]
        for chunk, some in ((None, None), (4, None), (1, None), (4, order)):
            leaves = [t.clone().requires_grad_() for t in (given.hidden, given.weight, given.bias)]
            rows = given.rows if some is None else given.rows.rows(some)
            teacher = teacher_rows(given, top, torch.float64)
            output = distillation_loss(objective, leaves[0], LMHead(leaves[1], leaves[2]), teacher, rows, chunk)
            found = [output.sum.detach(), *torch.autograd.grad(output.sum, leaves)]
            for a, b in zip(found, wanted, strict=True):
                assert torch.allclose(a, b, rtol=1e-9, atol=1e-10)


def test_no_rows_and_another_temperature() -> None:
    given = problem()
    none = given.rows.rows(torch.zeros(0, dtype=torch.long))
    objective = Objective(NoGate(), Mask(), SequenceReverseKL())
    head = LMHead(given.weight, given.bias)
    output = distillation_loss(objective, given.hidden, head, teacher_rows(given, None, torch.float64), none)
    assert float(output.sum) == 0
    with pytest.raises(ConfigError, match="temperature 1"):
        Objective(NoGate(), Mask(), SequenceReverseKL(), divergence_temperature=2.0)


def test_a_token_that_only_the_teacher_could_draw_is_silent_and_no_nan() -> None:
    """q(y) = e⁻²⁰⁰ in mixed text: w_t is 0 in float32, so the row's loss is, whatever follows it."""
    logits = torch.tensor([[0.0, 0.0, -200.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
    rows = SupervisedRows(torch.arange(2), torch.tensor([2, 2]), TokenKeys(torch.zeros(2).long(), torch.arange(2)))
    hidden, head = logits.requires_grad_(), LMHead(torch.eye(3), None)
    objective = Objective(NoGate(), Mask(), SequenceReverseKL(teacher_mix=0.2))
    output = distillation_loss(objective, hidden, head, HiddenTeacher(teacher, LMHead(torch.eye(3), None)), rows)
    output.sum.backward()
    assert output.terms.loss[0] == 0 and torch.isfinite(output.terms.loss[1])
    assert hidden.grad is not None and bool((hidden.grad[0] == 0).all()) and bool((hidden.grad[1] != 0).any())
