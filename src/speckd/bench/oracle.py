"""A control that knows what no rule can know: where the teacher was made wrong."""

from dataclasses import dataclass

from torch import Tensor

from speckd.teachers.unreliable import scrambling
from speckd.types import Rows


@dataclass(frozen=True)
class Oracle:
    """Accepts exactly where a `ScrambledTeacher` of this seed and fraction is left as it is."""

    fraction: float
    seed: int

    @property
    def notation(self) -> str:
        return "1[the teacher is not scrambled at t]"

    def __call__(self, rows: Rows) -> Tensor:
        draws = scrambling(self.seed, rows.keys.sample, rows.keys.position - 1)  # the keys are the predicted token's
        return (draws[:, 0] >= self.fraction).to(rows.student_logits.dtype)
