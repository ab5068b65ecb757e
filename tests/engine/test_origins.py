"""Two origins, two objectives: one sum, one count."""

import pytest
import torch

from speckd import LMHead, Objective, distillation_loss
from speckd.divergences import SkewedReverseKL, forward_kl
from speckd.gates import LabelRatio, NoGate, TopK
from speckd.origins import loss_by_origin
from speckd.policies import DownWeight, Label, Mask
from speckd.teachers import DenseTeacher
from speckd.tokens import SupervisedRows
from speckd.types import TokenKeys

OBJECTIVES = {
    "two divergences": (Objective(NoGate(), Mask(), forward_kl), Objective(NoGate(), Mask(), SkewedReverseKL(0.1))),
    "gates, weight": (
        Objective(TopK(3), DownWeight(), forward_kl, normalizer="weight"),
        Objective(TopK(3), Mask(), forward_kl, normalizer="weight"),
    ),
    "labels of the data only": (
        Objective(LabelRatio(), Label(), forward_kl, label_loss_weight=0.3),
        Objective(TopK(3), DownWeight(), forward_kl),
    ),
    "sft on the data": (Objective(NoGate(), Mask(), label_loss_weight=1.0), Objective(NoGate(), Mask())),
}


@pytest.mark.parametrize("case", OBJECTIVES)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_sum_and_count_and_gradients_are_those_of_both_parts(case: str, share: float) -> None:
    of_data, of_student = OBJECTIVES[case]
    generator = torch.Generator().manual_seed(0)
    tokens, width, vocabulary = 40, 6, 12
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    teacher = DenseTeacher(2 * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64))
    index = torch.arange(tokens)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    rows = SupervisedRows(index, labels, TokenKeys(index // 5, index % 5))
    written = torch.rand(tokens, generator=generator) < share

    def gradients(compute):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        total, count = compute(leaves[0], LMHead(leaves[1]))
        total.backward()
        return [total.detach(), count, *(leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves)]

    def together(states, head):
        output = loss_by_origin(of_data, of_student, written, states, head, teacher, rows, 7, None)
        assert len(output.rows) == len(output.terms.loss) == len(output.teacher_entropy) == tokens
        assert torch.equal(output.rows.index.sort().values, index)
        assert torch.allclose(output.terms.loss.sum(), output.sum.detach())
        return output.sum, output.count

    def apart(states, head):
        whole = []
        for objective, own in ((of_data, ~written), (of_student, written)):
            needed = teacher if objective.needs_teacher else None
            for i in own.nonzero()[:, 0]:  # row by row
                whole.append(distillation_loss(objective, states, head, needed, rows.rows(i[None]), 1, None))
        return sum(each.sum for each in whole), sum(each.count for each in whole)

    for found, wanted in zip(gradients(together), gradients(apart), strict=True):
        assert torch.allclose(found.double(), wanted.double(), rtol=1e-9, atol=1e-10)
