"""LK losses: the chance that speculative decoding accepts the student's draft, α = Σ_v min(p, q) = 1 − TV, as the objective.

Formulas as arXiv 2602.23881 gives them in its abstract and in reading notes; its body was not available to us.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, abs, where

from speckd.divergences import Entrywise, forward_kl, total_variation
from speckd.errors import ConfigError


def acceptance_rate(student: Tensor, teacher: Tensor) -> Tensor:
    """α = Σ_v min(p, q), [N], of log-probabilities, both [N, S]."""
    return torch.minimum(student, teacher).exp().sum(-1)


@dataclass(frozen=True)
class LKAlpha:
    """−log α (2602.23881); infinite where student and teacher share no token."""

    notation: ClassVar[str] = "−log Σ_v min(p_t, q_t)"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return -torch.logsumexp(torch.minimum(student, teacher), dim=-1)


@dataclass(frozen=True)
class KLWithTotalVariation:
    """λ·KL(p ‖ q) + (1 − λ)·TV(p, q): the hybrid once its λ, `kl_share`, is known."""

    kl_share: float

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return self.kl_share * forward_kl(student, teacher) + (1 - self.kl_share) * total_variation(student, teacher)

    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(_kl_with_total_variation_entry, self.kl_share)


def _kl_with_total_variation_entry(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    gap = q - p
    slope = where(gap > 0, q, where(gap < 0, -q, 0 * q))
    return a * p * (log_p - log_q) + (1 - a) * 0.5 * abs(gap), (1 - a) * 0.5 * slope - a * p


@dataclass(frozen=True)
class LKHybrid:
    """λ·KL(p ‖ q) + (1 − λ)·TV(p, q), λ = exp(−η·ᾱ), ᾱ the batch's mean α, constant (2602.23881, η = 3): a `BatchDivergence`.

    From KL, where hardly anything is accepted, to total variation. The batch is one forward's supervised tokens on all
    processes, rejected ones included: ᾱ says how far the student is, whatever it is taught.
    """

    eta: float = 3.0

    def __post_init__(self) -> None:
        if not self.eta >= 0:
            raise ConfigError(f"eta is {self.eta}", "Use eta of at least 0 (the paper's is 3)")

    @property
    def notation(self) -> str:
        return f"λ·KL(p_t ‖ q_t) + (1 − λ)·TV(p_t, q_t); λ = exp(−{self.eta:g}·mean_t Σ_v min(p_t, q_t))"

    def score(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return acceptance_rate(student, teacher)

    def settle(self, scores: Tensor) -> KLWithTotalVariation:
        return KLWithTotalVariation(math.exp(-self.eta * float(scores.double().mean())))
