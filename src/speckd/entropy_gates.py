"""Gates that weigh every token by two entropies, softly and by itself. Notation: p teacher, q student, H entropy in nats.

The methods' own extra parts (EA-KD's other losses; TSD-KD's preference ranking, its entropy term) are not here.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from speckd.comparisons import whole
from speckd.types import Rows


@dataclass(frozen=True)
class EntropyWeight:
    """EA-KD's weight (H(p) + H(p)·H(q)/H_max)/2 with H_max = log V (arXiv 2311.13621), divided by its largest value, log V.

    So an acceptance in [0, 1], `(h_p + h_p·h_q)/2` with h = H/log V; with `normalizer: weight` the division changes nothing,
    with `valid` it is a smaller step. The authors' code takes the entropies at a temperature of 3; here it is 1.
    """

    notation: ClassVar[str] = "(h_p + h_p·h_q)/2, h = H/log V"

    def __call__(self, rows: Rows) -> Tensor:
        teacher, student = _entropies(rows, "entropy_weight")
        largest = math.log(max(rows.student_logits.shape[-1], 2))
        return ((teacher + teacher * student / largest) / (2 * largest)).clamp(0, 1)


@dataclass(frozen=True)
class EntropyGap:
    """TSD-KD's direct part: weight σ(H(q) − H(p)), more where the student is less sure than the teacher (arXiv 2603.13260).

    The paper goes with `divergence: generalized_jsd`.
    """

    notation: ClassVar[str] = "σ(H(q_t) − H(p_t))"

    def __call__(self, rows: Rows) -> Tensor:
        teacher, student = _entropies(rows, "entropy_gap")
        return torch.sigmoid(student - teacher)


def _entropies(rows: Rows, gate: str) -> tuple[Tensor, Tensor]:
    """[N] each, the teacher's and the student's."""
    why = f"{gate} needs the whole of the teacher's distribution"
    return whole(rows.teacher, rows.student_logits.shape[-1], why).entropy(), rows.student.entropy()
