"""AdaKD's temperature of each token (Xie et al., arXiv 2510.11615): sharp where the student is far off, smooth where near."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from speckd.divergences import forward_kl
from speckd.errors import ConfigError
from speckd.support import log_softmax
from speckd.types import Divergence, notation_of


@dataclass(frozen=True)
class TokenTemperature:
    """τ_i²·D at temperature τ_i = τ₀·exp(−c·tanh(log(s_i/m))), s Hellinger's distance, m a median: a `BatchDivergence`.

    m is the (lower) median of s over the highest `fraction` of the batch, which is to be the gate's where one selects by
    `hellinger`: the authors' code takes it over the selected tokens. From there, too: the factor τ². c = 0.5 is from notes on
    the paper, whose body was not read; the code's own default is 0.3 or 0.5. τ carries no gradient; whether the paper's does is
    not known. Where m is 0, every temperature is τ₀.

    Args:
        divergence: D, of log-probabilities at the token's own temperature.
        base: τ₀.
        sensitivity: c.
        fraction: of the batch's tokens, those with the largest s, whose median is taken.
    """

    needs_whole_teacher: ClassVar[bool] = True
    divergence: Divergence = forward_kl
    base: float = 1.0
    sensitivity: float = 0.5
    fraction: float = 1.0

    def __post_init__(self) -> None:
        if not self.base > 0:
            raise ConfigError(f"base is {self.base}", "Use a temperature above 0")
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}", "Use the gate's fraction, or 1 where all tokens are learnt")

    @property
    def notation(self) -> str:
        return f"τ_t²·[{notation_of(self.divergence)}]^(1/τ_t), τ_t = {self.base:g}·exp(−{self.sensitivity:g}·tanh log(s_t/m))"

    def score(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return _hellinger(student, teacher)

    def settle(self, scores: Tensor) -> "Tempered":
        count = math.ceil(self.fraction * len(scores) - 1e-9)
        median = scores.sort(descending=True).values[:count].median()
        return Tempered(self.divergence, self.base, self.sensitivity, float(median))


@dataclass(frozen=True)
class Tempered:
    """`TokenTemperature` once the median is known."""

    divergence: Divergence
    base: float
    sensitivity: float
    median: float

    def temperatures(self, student: Tensor, teacher: Tensor) -> Tensor:
        """[n, 1] of log-probabilities, both [n, S]."""
        distance = _hellinger(student, teacher)
        ratio = distance / self.median if self.median > 0 else torch.ones_like(distance)
        return self.base * torch.exp(-self.sensitivity * torch.tanh(ratio.log()))[:, None]  # of a ratio of 0, tanh is −1

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            tau = self.temperatures(student, teacher)
        # Log-probabilities are logits up to a shift of the row, so nothing is lost by tempering them.
        return tau[:, 0] ** 2 * self.divergence(log_softmax(student / tau), log_softmax(teacher / tau))


def _hellinger(student: Tensor, teacher: Tensor) -> Tensor:
    return (((student / 2).exp() - (teacher / 2).exp()).square().sum(-1) / 2).sqrt()
