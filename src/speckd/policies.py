"""Weigh: what a token gets that the gate did not (wholly) accept. An axis of its own, for any gate and any divergence.

A policy splits each token's weight between the divergence and a fallback loss, and says what that fallback is. `notation`:
the divergence's weight V_t in terms of the acceptance a_t; `fallback_notation`: what is added where there is a fallback.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from speckd.divergences import forward_kl
from speckd.errors import ConfigError


@dataclass(frozen=True)
class FallbackRows:
    """What a fallback may learn from, for n rows.

    `label_log_prob`: [n], the student's log q(y) at temperature 1; `support()`: student and teacher log-probabilities, both
    [n, S], on the shared support at the divergence temperature, made only where they are asked for; `temperature`: that one.
    """

    label_log_prob: Tensor
    support: Callable[[], tuple[Tensor, Tensor]]
    temperature: float


class RejectedPolicy(Protocol):
    def weights(self, acceptance: Tensor) -> tuple[Tensor, Tensor]:
        """[N] acceptance -> ([N] weight of the divergence, [N] weight of the fallback)."""
        ...

    def fallback(self, rows: FallbackRows) -> Tensor:
        """[n] loss of the rows whose fallback weight is not zero."""
        ...


@runtime_checkable
class HasFallback(Protocol):
    """A policy that states what is added to the divergence."""

    @property
    def fallback_notation(self) -> str: ...


@dataclass(frozen=True)
class Mask:
    """A rejected token teaches nothing: the paper's first version, β = 0."""

    notation: ClassVar[str] = "a_t"

    def weights(self, acceptance: Tensor) -> tuple[Tensor, Tensor]:
        return acceptance, torch.zeros_like(acceptance)

    def fallback(self, rows: FallbackRows) -> Tensor:
        return torch.zeros_like(rows.label_log_prob)


@dataclass(frozen=True)
class DownWeight:
    """A rejected token keeps `rejected_weight` of its divergence, `V = β + (1 − β)·accepted`: the second version, β = 0.01."""

    rejected_weight: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.rejected_weight <= 1:
            raise ConfigError(f"rejected_weight is {self.rejected_weight}", "Use a rejected_weight between 0 and 1")

    @property
    def notation(self) -> str:
        return f"{self.rejected_weight:g} + {1 - self.rejected_weight:g}·a_t"

    def weights(self, acceptance: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.rejected_weight + (1 - self.rejected_weight) * acceptance
        return kept, torch.zeros_like(acceptance)

    def fallback(self, rows: FallbackRows) -> Tensor:
        return torch.zeros_like(rows.label_log_prob)


@dataclass(frozen=True)
class Label:
    """The weight that the divergence loses goes to cross-entropy on the data's token. Ours."""

    notation: ClassVar[str] = "a_t"
    fallback_notation: ClassVar[str] = "(1 − a_t)·(−log q_t(y_t))"

    def weights(self, acceptance: Tensor) -> tuple[Tensor, Tensor]:
        return acceptance, 1 - acceptance

    def fallback(self, rows: FallbackRows) -> Tensor:
        return -rows.label_log_prob


@dataclass(frozen=True)
class Residual:
    """The lost weight goes to `KL(r ‖ q)`, `r = norm(max(0, p − q))`: what speculative decoding resamples from. Ours.

    r is a constant target; where p = q there is no residual and nothing to learn: the loss is 0. Where they differ by little
    more than rounding, so does r from noise: use it with gates that accept such tokens, as all but the controls do.
    """

    notation: ClassVar[str] = "a_t"
    fallback_notation: ClassVar[str] = "(1 − a_t)·KL(norm(max(0, p_t − q_t)) ‖ q_t)"

    def weights(self, acceptance: Tensor) -> tuple[Tensor, Tensor]:
        return acceptance, 1 - acceptance

    def fallback(self, rows: FallbackRows) -> Tensor:
        student, teacher = rows.support()
        with torch.no_grad():
            excess = (teacher.exp() - student.exp()).clamp(min=0)
            mass = excess.sum(-1, keepdim=True)
            target = (excess / mass.where(mass > 0, 1)).log()
        return rows.temperature**2 * forward_kl(student, target)
