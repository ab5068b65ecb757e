"""Which samples of a step are written anew: decided by counter, so by all processes alike, whatever the batches are."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from speckd.randomness import uniforms

_STREAM = 17
#: DistiLLM's steps of its own share, as its authors' script has them: by how much it grows, and past which rise of the loss.
_GROWTH, _RISE = 0.1, 0.1


class Origin(IntEnum):
    """Whose words a row trains on: the data's, the student's of this step, or the student's of an earlier one."""

    DATA = 0
    STUDENT = 1
    REPLAY = 2


@dataclass(frozen=True)
class Mixture:
    """A share of the samples that the student writes, drawn for each sample of each step.

    `fraction`: at the beginning; `end`: after the last step, linear between both; None: the same throughout. GKD (arXiv
    2306.13649) draws once for a whole batch: the same on average, with more variance.
    """

    seed: int
    fraction: float = 1.0
    end: float | None = None

    def fraction_at(self, step: int, steps: int) -> float:
        """After `step` of `steps` optimizer steps."""
        if self.end is None:
            return self.fraction
        return self.fraction + (self.end - self.fraction) * min(step / max(steps, 1), 1.0)

    def origins(self, samples: Tensor, step: int, fraction: float, fresh: float | None = None) -> Tensor:
        """[N] sample numbers -> [N] `Origin`: a `fraction` is the student's, of which all but `fresh` is replayed (None: none).

        Both are shares of all samples. A sample decides by one uniform, so a larger share holds all of a smaller one.
        """
        uniform = uniforms(self.seed, step, samples, torch.zeros_like(samples), draws=1, stream=_STREAM)[:, 0, 0]
        written = torch.where(uniform < fraction, int(Origin.STUDENT), int(Origin.DATA))
        if fresh is None:
            return written
        return written.masked_fill((uniform >= fresh) & (uniform < fraction), int(Origin.REPLAY))


class AdaptiveFraction:
    """DistiLLM's own share of student-written text: it grows when the held-out loss does (arXiv 2402.03898, section 3.2).

    The paper was not to be had in full: that the share grows by 0.1 where a loss is at least 0.1 above the last one that made
    it grow (at first, the one before training), up to 1, is read off its authors' published program.
    """

    def __init__(self, fraction: float) -> None:
        self.fraction, self.loss = fraction, float("nan")

    def hear(self, loss: float) -> None:
        """Of a held-out loss, nats per token."""
        if self.loss != self.loss:
            self.loss = loss
        elif loss >= self.loss + _RISE:
            self.fraction, self.loss = min(self.fraction + _GROWTH, 1.0), loss

    def state(self) -> dict[str, Any]:
        return {"fraction": self.fraction, "loss": None if self.loss != self.loss else self.loss}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.fraction = state["fraction"]
        self.loss = float("nan") if state["loss"] is None else state["loss"]
