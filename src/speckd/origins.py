"""One loss over rows of two origins, the data's and the student's own text, each by its objective: one sum, one count."""

from dataclasses import fields

import torch
from torch import Tensor

from speckd.early_rejection import EarlyRejection
from speckd.engine import LossOutput, distillation_loss
from speckd.head import LMHead
from speckd.objective import Objective, TokenTerms
from speckd.tokens import SupervisedRows
from speckd.types import TeacherRows


def loss_by_origin(
    of_data: Objective,
    of_student: Objective,
    written: Tensor,
    hidden: Tensor,
    head: LMHead,
    teacher: TeacherRows | None,
    rows: SupervisedRows,
    chunk_size: int | None,
    early_rejection: EarlyRejection | None,
) -> LossOutput:
    """As `distillation_loss`, with an objective for each origin. A gate that ranks a batch ranks each origin by itself.

    Args:
        of_data, of_student: of the data's rows, and of those that the student wrote.
        written: [N] bool, which of the supervised rows the student wrote.
        hidden, head, teacher, rows, chunk_size, early_rejection: as of `distillation_loss`.
    """
    parts: list[LossOutput] = []
    for objective, own in ((of_data, ~written), (of_student, written)):
        index = own.nonzero()[:, 0]
        if len(index) or not parts:
            needed = teacher if objective.needs_teacher else None
            parts.append(distillation_loss(objective, hidden, head, needed, rows.rows(index), chunk_size, early_rejection))
    return parts[0] if len(parts) == 1 else _joined(parts[0], parts[1])


def _joined(a: LossOutput, b: LossOutput) -> LossOutput:
    return LossOutput(
        a.sum + b.sum,
        a.count + b.count,
        _joined_rows(a.rows, b.rows),
        TokenTerms(*(torch.cat([getattr(a.terms, f.name), getattr(b.terms, f.name)]) for f in fields(TokenTerms))),
        torch.cat([a.teacher_entropy, b.teacher_entropy]),
    )


def _joined_rows(a: SupervisedRows, b: SupervisedRows) -> SupervisedRows:
    keys = type(a.keys)(
        torch.cat([a.keys.sample, b.keys.sample]), torch.cat([a.keys.position, b.keys.position]), a.keys.seed, a.keys.epoch
    )
    return SupervisedRows(torch.cat([a.index, b.index]), torch.cat([a.labels, b.labels]), keys)
