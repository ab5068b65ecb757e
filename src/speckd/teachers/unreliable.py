"""A teacher made wrong on purpose, to test how a gate bears it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from speckd.errors import CapabilityError, ConfigError
from speckd.randomness import uniforms
from speckd.types import DenseSignal, DenseTeacherRows, TeacherRows

_STREAM = 2  # apart from the gates' draws


def scrambling(seed: int, sample: Tensor, position: Tensor) -> Tensor:
    """[n, 2] uniforms of the positions that predict: below the fraction in the first, a teacher is scrambled there."""
    return uniforms(seed, 0, sample, position, draws=1, stream=_STREAM)[:, 0]


@dataclass(frozen=True)
class ScrambledTeacher:
    """At a random `fraction` of positions, the teacher's distribution over other tokens: its logits rolled along V.

    Which positions, and how far, is a function of (seed, sample, position): the same in every epoch and for any batching.

    Args:
        teacher: a teacher with the whole vocabulary.
        fraction: share of positions, 0 to 1.
        sample, position: [B·L] int64, who predicts what at each flattened position (any function of the token will do).
        seed: of the scrambling, not of the gate.
    """

    teacher: TeacherRows
    fraction: float
    sample: Tensor
    position: Tensor
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.fraction <= 1:
            raise ConfigError(f"the scrambled fraction is {self.fraction}", "Use a fraction between 0 and 1")

    def scrambled(self, index: Tensor) -> Tensor:
        """[n] bool: where the teacher is wrong (an oracle gate knows)."""
        return self._draws(index)[:, 0] < self.fraction

    @property
    def dtype(self) -> torch.dtype:
        return self._whole.dtype

    @property
    def vocabulary_size(self) -> int:
        return self._whole.vocabulary_size

    def write_logits(self, index: Tensor, out: Tensor) -> None:
        self._whole.write_logits(index, out)
        shifts = self._shifts(index)
        for row in shifts.nonzero()[:, 0].tolist():
            out[row] = out[row].roll(-int(shifts[row]))

    def logits_at(self, index: Tensor, token_ids: Tensor) -> Tensor:
        return self._whole.logits_at(index, (token_ids + self._shifts(index)[:, None]) % self.vocabulary_size)

    def signal(self, index: Tensor) -> DenseSignal:
        logits = torch.empty(len(index), self.vocabulary_size, dtype=self.dtype, device=index.device)
        self.write_logits(index, logits)
        return DenseSignal(logits)

    @property
    def _whole(self) -> DenseTeacherRows:
        if not isinstance(self.teacher, DenseTeacherRows):
            raise CapabilityError("only a teacher with its whole vocabulary can be scrambled", "Scramble before truncating")
        return self.teacher

    def _shifts(self, index: Tensor) -> Tensor:
        """[n] by how many tokens each row is rolled, 0 where the teacher is left as it is."""
        draws = self._draws(index)
        return torch.where(draws[:, 0] < self.fraction, 1 + (draws[:, 1] * (self.vocabulary_size - 1)).long(), 0)

    def _draws(self, index: Tensor) -> Tensor:
        return scrambling(self.seed, self.sample[index], self.position[index])
