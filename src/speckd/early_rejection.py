"""Certified early rejection: a row whose rejection a few of the teacher's logits prove never needs the teacher's projection.

If k tokens already beat the proposal among *some* of the teacher's logits, they do among all. In general, some logits bound
every probability from above and every rank from below, and a monotone gate that says no to the bounds says no to the truth. So
the gate itself is asked, about a teacher that errs towards acceptance wherever it does not know.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from speckd import tiles
from speckd.types import DenseSignal, DenseTeacherRows, MonotoneGate, OptimisticSignal, Rows, TokenKeys

#: Rows that are looked at before it is known whether that pays; a GPU looks at few as slowly as at many.
_TRIAL_ROWS = {"cpu": 64}
_TRIAL_ROWS_ELSEWHERE = 2048


@dataclass(frozen=True)
class EarlyRejection:
    """Tries a few rows of each batch, and goes on only where what it proves is worth more than what it costs.

    The decision depends on the data alone, never on the clock, so that a run can be repeated and resumed to the same bits.

    Args:
        candidates: how many tokens are looked at in each row, beside the label: winners of the student's best tiles.
        least_rate: share of rows that must be certified to go on; by default, from where looking costs less than it spares.
    """

    candidates: int = 16
    least_rate: float | None = None

    def worth_it(self, vocabulary_size: int, device_type: str) -> float:
        """The share of certified rows from which looking pays; 1 or more where it never does."""
        if self.least_rate is not None:
            return self.least_rate
        if device_type != "cpu":
            return 1.0
        return _COST_OF_A_TOKEN * (self.candidates + 1) / vocabulary_size + _COST_OF_A_ROW

    def possible(
        self,
        gate: MonotoneGate,
        student: DenseSignal,
        teacher: DenseTeacherRows,
        index: Tensor,
        labels: Tensor,
        keys: TokenKeys,
    ) -> Tensor:
        """[n] bool: False where the rejection is certified.

        Args:
            gate: monotone.
            student: n rows.
            teacher: answers for `index`, [n].
            labels, keys: of the rows.
        """
        found = torch.ones(len(index), dtype=torch.bool, device=index.device)
        step = _TRIAL_ROWS.get(index.device.type, _TRIAL_ROWS_ELSEWHERE)
        for start in range(0, len(index), step):
            some = slice(start, min(len(index), start + step))
            part = student.rows(some)
            bounds = self._bounds(part, teacher, index[some], labels[some])
            seen = Rows.of(part, bounds, labels[some], keys.rows(some))  # type: ignore[arg-type]
            found[some] = gate(seen) != 0
            tried = found[: some.stop]
            if float((~tried).double().mean()) < self.worth_it(teacher.vocabulary_size, index.device.type):
                break
        return found

    def _bounds(self, student: DenseSignal, teacher: DenseTeacherRows, index: Tensor, labels: Tensor) -> OptimisticSignal:
        best = student.tile_maxima.topk(min(self.candidates, student.tile_maxima.shape[-1]), dim=-1).indices
        ids = torch.cat([tiles.winners(student.logits, best), labels[:, None]], -1)
        logits = teacher.logits_at(index, ids)
        new = (ids[:, :-1] != labels[:, None]).all(-1, keepdim=True)  # the label may be a winner, too
        distinct = torch.cat([torch.ones_like(best, dtype=torch.bool), new], -1)
        exact = logits.device.type != "cuda" or torch.get_float32_matmul_precision() == "highest"
        margin = (1e-5 if exact else 2e-3) * (1 + logits.abs().amax(-1, keepdim=True))  # TF32 rounds the projection's factors
        return OptimisticSignal(ids, logits, distinct, margin)


#: Looking at one token of one row, against one logit of a projection; looking at a row at all, against projecting it.
#: Measured on a CPU with a teacher 1,024 wide: a row costs 21 % of its projection at V = 8,000, 7 % at 32,000.
#: On a GPU looking took longer than it spared, but with all rows of 5,000 in one chunk (H200, teacher 3,584 wide, V = 152,064).
_COST_OF_A_TOKEN, _COST_OF_A_ROW = 100.0, 0.01
