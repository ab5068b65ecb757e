"""What the engine spares, and what it must not change by sparing it. (Loss and gradients: tests/parity, tests/invariants.)"""

from dataclasses import dataclass, replace

import pytest
import torch

from speckd import LMHead, Objective, distillation_loss
from speckd.divergences import SkewedReverseKL
from speckd.engine import default_chunk_size
from speckd.gates import NoGate, TopK
from speckd.policies import Label, Mask
from speckd.teachers import DenseTeacher, HiddenTeacher, TopKTeacher
from speckd.tokens import SupervisedRows
from speckd.types import DenseSignal, TokenKeys
from tests.parity.cases import DIVERGENCES, ENTRYWISE, problem


@pytest.mark.parametrize("name", ENTRYWISE)
def test_a_closed_form_is_its_divergence_and_autograds_slope(name: str) -> None:
    divergence = ENTRYWISE[name]
    generator = torch.Generator().manual_seed(1)
    log_q, log_p = ((2 * torch.randn(6, 40, generator=generator)).double().log_softmax(-1) for _ in range(2))
    leaf = log_q.clone().requires_grad_()
    value = divergence(leaf, log_p)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    form = divergence.entrywise
    values, found = form.entry(log_q, log_p, log_q.exp(), log_p.exp(), form.a, form.b)
    assert torch.allclose(values.sum(-1), value, rtol=1e-12, atol=1e-14)
    assert torch.allclose(found, slope, rtol=1e-11, atol=1e-14)


@dataclass(frozen=True)
class Spied(LMHead):
    """Counts the rows of its products."""

    written: tuple = ()

    def write(self, hidden, out) -> None:
        COUNTS["forward"] += len(hidden)
        super().write(hidden, out)

    def back(self, gradients, dtype):
        COUNTS["backward"] += len(gradients)
        return super().back(gradients, dtype)

    def detached(self):
        return Spied(self.weight.detach(), None if self.bias is None else self.bias.detach())


COUNTS: dict[str, int] = {}


@pytest.mark.parametrize("chunk", [5, 16, 200])
@pytest.mark.parametrize("rejected", [Mask(), Label()], ids=["mask", "label"])
def test_products_are_made_for_supervised_rows_and_for_those_with_a_gradient(rejected, chunk) -> None:
    given = problem(seed=4, tokens=120, vocabulary=60)
    keep = torch.arange(0, 120, 2)  # half of the rows are supervised
    rows = SupervisedRows(keep, given.rows.labels[keep], given.rows.keys.rows(keep))
    COUNTS.update(forward=0, backward=0)
    hidden = given.hidden.float().requires_grad_()
    head = Spied(given.weight.float().requires_grad_(), given.bias.float())
    output = distillation_loss(Objective(TopK(3), rejected), hidden, head, DenseTeacher(given.teacher.float()), rows, chunk)
    accepted = int(output.terms.acceptance.sum())
    assert 0 < accepted < 60
    assert COUNTS["forward"] == 60 and COUNTS["backward"] == (accepted if isinstance(rejected, Mask) else 60)
    assert output.terms.divergence.isnan().sum() == 60 - accepted  # a rejected row is given none


def test_a_frozen_head_gets_no_gradient_and_a_frozen_student_none_either() -> None:
    given = problem(seed=4)
    teacher = DenseTeacher(given.teacher.float())
    hidden, weight = given.hidden.float().requires_grad_(), given.weight.float()
    distillation_loss(Objective(), hidden, LMHead(weight), teacher, given.rows).sum.backward()
    assert hidden.grad is not None and weight.grad is None
    weight = weight.clone().requires_grad_()
    distillation_loss(Objective(), given.hidden.float(), LMHead(weight), teacher, given.rows).sum.backward()
    assert weight.grad is not None
    frozen = distillation_loss(Objective(), given.hidden.float(), LMHead(given.weight.float()), teacher, given.rows)
    assert not frozen.sum.requires_grad


def test_the_loss_is_differentiated_once_and_says_so() -> None:
    given = problem(seed=4)
    hidden = given.hidden.float().requires_grad_()
    loss = distillation_loss(
        Objective(), hidden, LMHead(given.weight.float()), DenseTeacher(given.teacher.float()), given.rows
    ).sum
    loss.backward()
    with pytest.raises(RuntimeError, match="compute it again"):
        loss.backward()


def test_a_factor_on_the_loss_is_a_factor_on_its_gradients() -> None:
    given = problem(seed=4)
    grads = []
    for factor in (1.0, 0.25):
        hidden, weight = given.hidden.float().requires_grad_(), given.weight.float().requires_grad_()
        output = distillation_loss(Objective(), hidden, LMHead(weight), DenseTeacher(given.teacher.float()), given.rows)
        (factor * output.sum).backward()
        grads.append((hidden.grad, weight.grad))
    assert all(torch.equal(0.25 * one, quarter) for one, quarter in zip(*grads, strict=True))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("objective", [Objective(NoGate(), Mask()), Objective(TopK(3), Label(), divergence_temperature=2.0)])
def test_scale_cap_and_bias_are_those_of_autograd(objective, softcap) -> None:
    """The head's whole formula, against logits of one's own that are differentiated by autograd."""
    given = problem(seed=6, tokens=20, vocabulary=40)
    grads = []
    for by_hand in (False, True):
        leaves = [t.clone().requires_grad_() for t in (given.hidden, given.weight, given.bias)]
        head = LMHead(leaves[1], leaves[2], 0.7, softcap)
        if by_hand:
            logits = head(leaves[0])
            eye = LMHead(torch.eye(40, dtype=torch.float64))
            output = distillation_loss(objective, logits, eye, DenseTeacher(given.teacher), given.rows)
        else:
            output = distillation_loss(objective, leaves[0], head, DenseTeacher(given.teacher), given.rows, 6)
        output.sum.backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_head_is_multiplied_in_float32(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=generator).to(dtype) for n in (5, 2000))
    out = torch.empty(5, 2000)
    LMHead(weight, torch.ones(2000, dtype=dtype), 2.0, 9.0).write(hidden, out)
    wanted = 9.0 * torch.tanh(2.0 * (hidden.double() @ weight.double().T + 1) / 9.0)
    assert torch.allclose(out.double(), wanted, rtol=1e-5, atol=1e-5)
    ids = torch.randint(2000, (5, 3), generator=generator)
    assert torch.allclose(
        LMHead(weight, None, 2.0).at(hidden, ids).double(), (2 * hidden.double() @ weight.double().T).gather(-1, ids), atol=1e-4
    )
    back = LMHead(weight, None, 2.0).back(out, torch.float32)
    assert torch.allclose(back.double(), 2 * out.double() @ weight.double(), rtol=1e-4, atol=1e-3)


def test_few_rows_are_as_exact_as_many() -> None:
    """A plain product of three rows adds up 150,000 entries one by one and loses two digits."""
    generator = torch.Generator().manual_seed(0)
    weight, gradients = torch.randn(150_000, 16, generator=generator), torch.zeros(3, 150_000)
    gradients += (3 * torch.randn(3, 150_000, generator=generator)).softmax(-1)
    wanted = gradients.double() @ weight.double()
    found = LMHead(weight).back(gradients, torch.float32).double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-6


def test_probabilities_add_up_at_a_real_vocabulary() -> None:
    logits = 3 * torch.randn(4, 151_936, generator=torch.Generator().manual_seed(3))
    total = DenseSignal(logits).log_probs.double().exp().sum(-1)
    assert float((total - 1).abs().max()) < 3e-6


def test_a_teacher_of_ones_own_is_not_written_to() -> None:
    """A signal may be a view of what the teacher keeps: the engine uses up its own copy only."""
    given = problem(seed=4)
    kept = given.teacher.float()

    class Own:
        def signal(self, index):
            return DenseSignal(kept[index[0] : index[-1] + 1])

    before = kept.clone()
    rows = replace(given.rows, keys=TokenKeys(given.rows.keys.sample, given.rows.keys.position))
    hidden = given.hidden.float().requires_grad_()
    found = distillation_loss(Objective(), hidden, LMHead(given.weight.float()), Own(), rows)
    wanted = distillation_loss(Objective(), hidden, LMHead(given.weight.float()), DenseTeacher(before), rows)
    assert torch.equal(kept, before) and torch.allclose(found.sum, wanted.sum)


def test_the_default_chunk_fits_its_budget_and_is_no_larger_than_speed_needs() -> None:
    assert default_chunk_size(152_064) * 152_064 * 8 <= 256 * 2**20 < (default_chunk_size(152_064) + 1) * 152_064 * 8
    assert default_chunk_size(32_000) == 320
    assert default_chunk_size(10**8) == 16
    assert default_chunk_size(152_064, "cuda", 2**30) == 2**30 // (8 * 152_064)


@pytest.mark.parametrize("chunk", [7, 10, 64])
def test_a_teacher_in_hidden_states_is_the_one_in_logits(chunk) -> None:
    given = problem(seed=8, tokens=50, vocabulary=90)
    head = LMHead(torch.randn(90, 5, generator=torch.Generator().manual_seed(1)).double())
    states = torch.randn(50, 5, generator=torch.Generator().manual_seed(2)).double()
    results = []
    for teacher in (HiddenTeacher(states, head), DenseTeacher(head(states))):
        hidden = given.hidden.clone().requires_grad_()
        output = distillation_loss(Objective(), hidden, LMHead(given.weight), teacher, given.rows, chunk)
        output.sum.backward()
        results.append((output.sum.detach(), hidden.grad))
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*results, strict=True))


def test_a_loss_without_gradient_is_the_same_also_in_inference_mode() -> None:
    given = problem(seed=8, tokens=30)
    for divergence in ("forward_kl", "adaptive_kl"):
        objective = Objective(TopK(3), Label(), DIVERGENCES[divergence])
        inputs = (given.hidden.float(), LMHead(given.weight.float()), DenseTeacher(given.teacher.float()), given.rows)
        with torch.inference_mode():
            found = distillation_loss(objective, *inputs).sum
        wanted = distillation_loss(objective, inputs[0].clone().requires_grad_(), *inputs[1:]).sum
        assert torch.allclose(found, wanted.detach())


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_hidden_states_and_head_may_differ_in_precision(dtypes) -> None:
    given = problem(seed=8, tokens=30)
    hidden, weight = (
        t.detach().clone().to(d).requires_grad_() for t, d in zip((given.hidden, given.weight), dtypes, strict=True)
    )
    distillation_loss(Objective(), hidden, LMHead(weight), DenseTeacher(given.teacher), given.rows, 7).sum.backward()
    exact, head = given.hidden.clone().requires_grad_(), given.weight.clone().requires_grad_()
    distillation_loss(Objective(), exact, LMHead(head), DenseTeacher(given.teacher), given.rows, 7).sum.backward()
    for found, wanted in ((hidden.grad, exact.grad), (weight.grad, head.grad)):
        assert found is not None and wanted is not None
        assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [4, 17])
def test_a_truncated_teacher_may_be_stored_in_any_precision(k, dtype) -> None:
    given = problem(seed=8, tokens=40)
    best = given.teacher.log_softmax(-1).topk(k)
    labels = given.teacher.log_softmax(-1).gather(-1, given.rows.labels[:, None])[:, 0]
    losses = []
    for kind in (dtype, torch.float64):
        hidden = given.hidden.float().requires_grad_()
        teacher = TopKTeacher(best.indices, best.values.to(kind), labels.to(kind))
        output = distillation_loss(Objective(TopK(3), Label()), hidden, LMHead(given.weight.float()), teacher, given.rows)
        output.sum.backward()
        losses.append(output.sum.detach())
    assert torch.allclose(losses[0], losses[1], rtol=2e-2 if dtype == torch.float16 else 1e-5)


def test_what_no_student_changes_has_no_gradient() -> None:
    """A constant fallback, a divergence that is 0 throughout, and one whose slope is an expanded tensor."""

    class Constant(Mask):
        def weights(self, acceptance):
            return acceptance, 1 - acceptance

    given = problem(seed=8, tokens=30)
    for objective in (
        Objective(TopK(3), Constant()),
        Objective(NoGate(), Mask(), SkewedReverseKL(1.0)),
        Objective(NoGate(), Mask(), lambda student, teacher: student.sum(-1)),
    ):
        hidden = given.hidden.float().requires_grad_()
        bias = given.bias.float()
        bias[3] = -torch.inf if isinstance(objective.divergence, SkewedReverseKL) else 0
        head = LMHead(given.weight.float(), bias, 1.0, None if bias[3] else 2.0)
        distillation_loss(objective, hidden, head, DenseTeacher(given.teacher.float()), given.rows).sum.backward()
        assert hidden.grad is not None and torch.isfinite(hidden.grad).all()
