"""A certified rejection is a rejection, and sparing the teacher's projection changes nothing else."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from speckd import LMHead, Objective, distillation_loss
from speckd.early_rejection import EarlyRejection
from speckd.engine import DIAGNOSED
from speckd.gates import Inverted, LabelInTopK, LabelRatio, NoGate, Random, Spec, TopK, TwoSided
from speckd.policies import DownWeight, Label, Mask, Residual
from speckd.teachers import HiddenTeacher, ScrambledTeacher
from speckd.tokens import SupervisedRows
from speckd.types import DenseSignal, MonotoneGate, Rows, TokenKeys

GATES = [TopK(1), TopK(5), TwoSided(3), LabelInTopK(2), Spec(1), Spec(4), LabelRatio(hard=True), Random(0.3)]
ALWAYS = EarlyRejection(least_rate=0.0)


@dataclass(frozen=True)
class Problem:
    hidden: torch.Tensor
    head: LMHead
    teacher: HiddenTeacher
    rows: SupervisedRows


def problem(seed: int, tokens: int = 40, width: int = 700, alike: float = 0.5, sharp: float = 1.0) -> Problem:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    hidden, weight = sharp * normal(tokens, 12), normal(width, 12)
    teacher_hidden = torch.cat([alike * hidden + (1 - alike) * sharp * normal(tokens, 12), normal(tokens, 4)], -1)
    teacher_head = LMHead(torch.cat([weight, 0.3 * normal(width, 4)], -1), 0.1 * normal(width), 0.9, 30.0)
    index = torch.arange(tokens)
    labels = torch.randint(width, (tokens,), generator=generator)
    likely = (teacher_hidden @ teacher_head.weight.T).argmax(-1)
    labels = torch.where(torch.rand(tokens, generator=generator) < 0.5, likely, labels)
    rows = SupervisedRows(index, labels, TokenKeys(index // 8, index % 8, seed, 1))
    return Problem(hidden, LMHead(weight), HiddenTeacher(teacher_hidden, teacher_head), rows)


@given(
    seed=st.integers(0, 10**6),
    gate=st.sampled_from(GATES),
    alike=st.floats(0, 1),
    sharp=st.floats(0.1, 4),
    candidates=st.integers(1, 20),
)
def test_no_accepted_row_is_certified(seed, gate, alike, sharp, candidates) -> None:
    given_ = problem(seed, alike=alike, sharp=sharp)
    rows = given_.rows
    student = DenseSignal(given_.head(given_.hidden))
    accepted = gate(Rows(student.logits, given_.teacher.signal(rows.index), rows.labels, rows.keys)) > 0
    certify = EarlyRejection(candidates, least_rate=0.0)
    possible = certify.possible(gate, student, given_.teacher, rows.index, rows.labels, rows.keys)
    assert (possible | ~accepted).all()


def test_unlike_models_are_certified_at_nearly_every_row() -> None:
    given_ = problem(1, tokens=200, width=4000, alike=0.0, sharp=2.0)
    rows, student = given_.rows, DenseSignal(given_.head(given_.hidden))
    possible = ALWAYS.possible(TopK(5), student, given_.teacher, rows.index, rows.labels, rows.keys)
    assert float(possible.double().mean()) < 0.5


@dataclass(frozen=True)
class Counting(HiddenTeacher):
    projected: list[int] = field(default_factory=list)

    def write_logits(self, index, out) -> None:
        self.projected.extend(index.tolist())
        super().write_logits(index, out)


@pytest.mark.parametrize("policy", [Mask(), Label(), DownWeight(0.1), Residual()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("gate", [*GATES, LabelRatio(), Inverted(TopK(5)), NoGate()], ids=repr)
def test_loss_verdicts_and_gradients_stay(gate, policy) -> None:
    given_ = problem(5, tokens=90, width=3000, alike=0.0, sharp=3.0)
    results, counts = [], []
    for certify in (None, ALWAYS):
        hidden, weight = given_.hidden.clone().requires_grad_(), given_.head.weight.clone().requires_grad_()
        teacher = Counting(given_.teacher.hidden, given_.teacher.head)
        output = distillation_loss(Objective(gate, policy), hidden, LMHead(weight), teacher, given_.rows, 16, certify)
        output.sum.backward()
        results.append((output.sum.detach(), output.terms.acceptance, output.terms.loss, hidden.grad, weight.grad))
        counts.append(len(teacher.projected))
        assert len(set(teacher.projected)) == len(teacher.projected)  # nothing twice
    for plain, spared in zip(*results, strict=True):
        assert torch.allclose(plain, spared, rtol=1e-5, atol=1e-6 * float(plain.abs().max()))
    assert torch.equal(results[0][1], results[1][1])
    assert counts[0] == 90
    if not (isinstance(gate, MonotoneGate) and gate.monotone and isinstance(policy, Mask | Label)):
        assert counts[1] == 90
    elif not isinstance(gate, LabelRatio):  # of unlike models, a few logits bound a label's probability but loosely
        assert counts[1] < 80


def test_a_scrambled_teacher_is_looked_at_where_it_is_scrambled() -> None:
    given_ = problem(3, tokens=60, alike=1.0)
    keys = given_.rows.keys
    teacher = ScrambledTeacher(given_.teacher, 0.5, keys.sample, keys.position, seed=2)
    index, ids = given_.rows.index, torch.randint(700, (60, 9), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(teacher.logits_at(index, ids), teacher.signal(index).logits.gather(-1, ids), rtol=1e-4, atol=1e-4)


def test_where_it_proves_too_little_it_stops_after_a_trial() -> None:
    given_ = problem(4, tokens=300, alike=1.0)
    asked: list[int] = []

    class Watching(HiddenTeacher):
        def logits_at(self, index, token_ids):
            asked.extend(index.tolist())
            return super().logits_at(index, token_ids)

    teacher, rows = Watching(given_.teacher.hidden, given_.teacher.head), given_.rows
    student = DenseSignal(given_.head(given_.hidden))
    EarlyRejection(least_rate=0.9).possible(TopK(5), student, teacher, rows.index, rows.labels, rows.keys)
    assert 0 < len(asked) < 300 and asked == rows.index[: len(asked)].tolist()


def test_one_token_in_32_has_its_teachers_entropy_whatever_becomes_of_it() -> None:
    given_ = problem(6, tokens=400, alike=0.0)
    rows = given_.rows
    hidden = given_.hidden.clone().requires_grad_()
    output = distillation_loss(Objective(TopK(5), Mask()), hidden, given_.head, given_.teacher, rows, 32, ALWAYS)
    measured = ~output.teacher_entropy.isnan()
    assert abs(int(measured.sum()) - 400 / DIAGNOSED) <= 8
    wanted = given_.teacher.signal(rows.index).entropy()
    assert torch.allclose(output.teacher_entropy[measured], wanted[measured], rtol=1e-4)
    assert bool((output.terms.acceptance[measured] == 0).any())
