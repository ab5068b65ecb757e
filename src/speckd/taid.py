"""TAID: a teacher that starts near the student and moves away from it (Shing et al., arXiv 2501.16937)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from speckd.divergences import forward_kl
from speckd.errors import ConfigError


@dataclass(frozen=True)
class TAID:
    """KL(p_t ‖ q), p_t = softmax((1 − t)·z_q + t·z_p), the student's part in it without gradient (2501.16937).

    t = 1 is forward KL. The paper moves t from 0.4 to 1 as it trains: that is a schedule's or a controller's matter.
    """

    t: float = 0.4

    def __post_init__(self) -> None:
        if not 0 <= self.t <= 1:
            raise ConfigError(f"t is {self.t}", "Use t between 0 (the student itself) and 1 (the teacher)")

    @property
    def notation(self) -> str:
        return f"KL(softmax({1 - self.t:.3g}·z_q + {self.t:.3g}·z_p) ‖ q_t)"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return forward_kl(student, self.target(student.detach(), teacher))

    def target(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[N, S] log-probabilities: those of logits mixed, since a row's normalisation falls out of the softmax."""
        if self.t in (0, 1):  # 0 · −∞ is no number
            return teacher if self.t == 1 else student
        return torch.log_softmax((1 - self.t) * student + self.t * teacher, dim=-1)
