"""A teacher made wrong on purpose, to test how a gate bears it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from speckd.errors import CapabilityError, ConfigError
from speckd.randomness import uniforms
from speckd.types import DenseSignal, TeacherRows

_STREAM = 2  # apart from the gates' draws


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

    def signal(self, index: Tensor) -> DenseSignal:
        signal = self.teacher.signal(index)
        if not isinstance(signal, DenseSignal):
            raise CapabilityError("only a teacher with its whole vocabulary can be scrambled", "Scramble before truncating")
        draws, width = self._draws(index), signal.logits.shape[-1]
        chosen = (draws[:, 0] < self.fraction).nonzero()[:, 0]
        shift = 1 + (draws[chosen, 1] * (width - 1)).long()
        columns = (torch.arange(width, device=index.device)[None] + shift[:, None]) % width
        rolled = signal.logits[chosen].gather(-1, columns)
        return DenseSignal(signal.logits.index_copy(0, chosen, rolled))

    def _draws(self, index: Tensor) -> Tensor:
        return uniforms(self.seed, 0, self.sample[index], self.position[index], draws=1, stream=_STREAM)[:, 0]
