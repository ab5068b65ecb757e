"""Diverge: how far the student is from the teacher, one number per token, each formula written once.

Calling a divergence with normalised log-probabilities (student q, teacher p), both [N, S], gives [N] nats, unweighted and
unreduced. −inf marks a zero probability; an entry that both give zero adds nothing, to the value and to the gradient.

That call is all that a divergence needs to be: autograd differentiates it. Where D is a sum over the entries, its `entrywise`
may state one entry's summand and slope in closed form, which the engine and its kernels run without autograd, in one pass.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, abs, clamp_min, exp, log, where

from speckd.errors import ConfigError


@dataclass(frozen=True)
class LabelNLL:
    """−log q(y), y the data's token, in the place of a divergence: so a gate weighs cross-entropy (SeqKD with the gate).

    Not called, since a divergence does not see the label: the loss takes the student's log q(y), which it has anyway.
    """

    notation: ClassVar[str] = "(−log q_t(y_t))"


@dataclass(frozen=True)
class Entrywise:
    """D = Σ_v f_v as the summand of one entry and its slope: `entry(log_q, log_p, q, p, a, b) -> (f, ∂f/∂log q)`.

    An entry uses arithmetic and `abs, clamp_min, exp, log, where` alone, so that the same lines run on tensors and in Triton.
    It need not bear −inf: where a result is not finite, the divergence itself is asked. `a`, `b`: its parameters.
    """

    entry: Callable[[Any, Any, Any, Any, float, float], tuple[Any, Any]]
    a: float = 0.0
    b: float = 0.0


@runtime_checkable
class HasEntries(Protocol):
    """A divergence with a closed form."""

    @property
    def entrywise(self) -> Entrywise: ...


def _expectation(log_weight: Tensor, value: Tensor) -> Tensor:
    """Σ exp(log_weight)·value over the entries with weight: inputs are masked, not the product, so no NaN can come back."""
    return (log_weight.exp() * torch.where(log_weight > -torch.inf, value, 0)).sum(-1)


def _log_ratio(a: Tensor, b: Tensor) -> Tensor:
    """a − b, and 0 where both are −inf."""
    absent = (a == -torch.inf) & (b == -torch.inf)
    return a.masked_fill(absent, 0) - b.masked_fill(absent, 0)


def _log_mixture(share: float, a: Tensor, b: Tensor) -> Tensor:
    """log(share·exp(a) + (1 − share)·exp(b)) for 0 < share < 1; 0 where both are −inf, where its weight is 0 anyway."""
    absent = (a == -torch.inf) & (b == -torch.inf)
    return torch.logaddexp(a.masked_fill(absent, 0) + math.log(share), b.masked_fill(absent, 0) + math.log1p(-share))


@dataclass(frozen=True)
class ForwardKL:
    """KL(p ‖ q) = Σ p log(p/q)."""

    notation: ClassVar[str] = "KL(p_t ‖ q_t)"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _expectation(teacher, _log_ratio(teacher, student))

    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(_forward_kl_entry)


def _forward_kl_entry(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    return p * (log_p - log_q), -p


@dataclass(frozen=True)
class ReverseKL:
    """KL(q ‖ p) = Σ q log(q/p)."""

    notation: ClassVar[str] = "KL(q_t ‖ p_t)"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return _expectation(student, _log_ratio(student, teacher))

    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(_reverse_kl_entry)


def _reverse_kl_entry(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    value = q * (log_q - log_p)
    return value, value + q


@dataclass(frozen=True)
class TotalVariation:
    """½ Σ |p − q|, in [0, 1] (not nats)."""

    notation: ClassVar[str] = "½ Σ_v |p_t − q_t|"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return 0.5 * (teacher.exp() - student.exp()).abs().sum(-1)

    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(_total_variation_entry)


def _total_variation_entry(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    gap = q - p
    return 0.5 * abs(gap), 0.5 * where(gap > 0, q, where(gap < 0, -q, 0 * q))


forward_kl, reverse_kl, total_variation = ForwardKL(), ReverseKL(), TotalVariation()


def require_share(name: str, value: float) -> None:
    """Refuses, by a `ConfigError`, what is not between 0 and 1."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}", f"Use {name} between 0 and 1")


@dataclass(frozen=True)
class GeneralizedJSD:
    """GKD's `β·KL(p ‖ m) + (1 − β)·KL(q ‖ m)`, m = βp + (1 − β)q (2306.13649, eq. 1).

    Its ends vanish, so β = 0 stands for forward KL and β = 1 for reverse KL, as in GKD and TRL.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        require_share("beta", self.beta)

    @property
    def notation(self) -> str:
        return f"JSD_{self.beta:g}(p_t, q_t)"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.beta == 0:
            return forward_kl(student, teacher)
        if self.beta == 1:
            return reverse_kl(student, teacher)
        mixture = _log_mixture(self.beta, teacher, student)
        return self.beta * _expectation(teacher, teacher - mixture) + (1 - self.beta) * _expectation(student, student - mixture)

    @property
    def entrywise(self) -> Entrywise:
        if self.beta in (0, 1):
            return (forward_kl if self.beta == 0 else reverse_kl).entrywise
        return Entrywise(_generalized_jsd_entry, self.beta)


def _generalized_jsd_entry(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    log_m = log(clamp_min(a * p + (1 - a) * q, 1e-37))
    own = (1 - a) * q * (log_q - log_m)
    return a * p * (log_p - log_m) + own, own


@dataclass(frozen=True)
class SkewedForwardKL:
    """DistiLLM's `KL(p ‖ αp + (1 − α)q)` (2402.03898)."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        require_share("alpha", self.alpha)

    @property
    def notation(self) -> str:
        return f"KL(p_t ‖ {self.alpha:g}·p_t + {1 - self.alpha:g}·q_t)"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.alpha == 0:
            return forward_kl(student, teacher)
        if self.alpha == 1:
            return 0 * student.exp().sum(-1)
        return _expectation(teacher, teacher - _log_mixture(self.alpha, teacher, student))

    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(_skewed_forward_kl_entry, self.alpha) if self.alpha > 0 else forward_kl.entrywise


def _skewed_forward_kl_entry(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    m = clamp_min(a * p + (1 - a) * q, 1e-37)
    return p * (log_p - log(m)), (a - 1) * p * q / m


@dataclass(frozen=True)
class SkewedReverseKL:
    """DistiLLM's `KL(q ‖ (1 − α)p + αq)` (2402.03898)."""

    alpha: float = 0.1

    def __post_init__(self) -> None:
        require_share("alpha", self.alpha)

    @property
    def notation(self) -> str:
        return f"KL(q_t ‖ {1 - self.alpha:g}·p_t + {self.alpha:g}·q_t)"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return SkewedForwardKL(self.alpha)(teacher, student)

    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(_skewed_reverse_kl_entry, self.alpha) if self.alpha > 0 else reverse_kl.entrywise


def _skewed_reverse_kl_entry(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    m = clamp_min((1 - a) * p + a * q, 1e-37)
    value = q * (log_q - log(m))
    return value, value + q * (1 - a * q / m)


@dataclass(frozen=True)
class AlphaBeta:
    """ABKD's α-β divergence (2505.04560): −1/(αβ) Σ [p^α q^β − α/(α+β) p^(α+β) − β/(α+β) q^(α+β)]."""

    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        if not (self.alpha > 0 and self.beta > 0):
            raise ConfigError(
                f"alpha_beta with alpha {self.alpha} and beta {self.beta}",
                "Use alpha and beta above 0 (the limits are forward_kl and reverse_kl)",
            )

    @property
    def notation(self) -> str:
        return f"D_AB(p_t ‖ q_t); α = {self.alpha:g}, β = {self.beta:g}"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        a, b, c = self.alpha, self.beta, self.alpha + self.beta
        cross = (a * teacher + b * student).exp()
        own = a / c * (c * teacher).exp() + b / c * (c * student).exp()
        return (own - cross).sum(-1) / (a * b)

    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(_alpha_beta_entry, self.alpha, self.beta)


def _alpha_beta_entry(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    cross, own = exp(a * log_p + b * log_q), exp((a + b) * log_q)
    value = (a * exp((a + b) * log_p) + b * own) / (a + b) - cross
    return value / (a * b), (own - cross) / a


@dataclass(frozen=True)
class AdaptiveKL:
    """AKL (2404.02657): forward and reverse KL, each by its share of the gap Σ|p − q| in the teacher's head and tail.

    The head is the most probable tokens while their cumulative probability stays within `head_mass`, and always the first.
    The shares are constants: no gradient flows through them.
    """

    head_mass: float = 0.5

    def __post_init__(self) -> None:
        require_share("head_mass", self.head_mass)

    @property
    def notation(self) -> str:
        head = f"s_t the share of Σ_v |p_t − q_t| in the head of mass {self.head_mass:g}"
        return f"s_t·KL(p_t ‖ q_t) + (1 − s_t)·KL(q_t ‖ p_t); {head}"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            ordered, order = teacher.exp().sort(dim=-1, descending=True, stable=True)
            gap = (ordered - student.exp().gather(-1, order)).abs()
            head = ordered.cumsum(-1) <= self.head_mass
            head[..., 0] = True
            head_gap, whole = (gap * head).sum(-1), gap.sum(-1)
            share = torch.where(whole > 0, head_gap / whole.where(whole > 0, 1), 0.5)
        return share * forward_kl(student, teacher) + (1 - share) * reverse_kl(student, teacher)


@dataclass(frozen=True)
class ToDi:
    """ToDi (2505.16297): each vocabulary entry mixes the two KLs by σ(log p/q) and σ(log q/p), both without gradient."""

    notation: ClassVar[str] = "Σ_v [σ(ρ)·p_t·ρ − (1 − σ(ρ))·q_t·ρ]; ρ = log(p_t/q_t)"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        ratio = _log_ratio(teacher, student)
        share = torch.sigmoid(ratio.detach())
        return _expectation(teacher, share * ratio) - _expectation(student, (1 - share) * ratio)

    @property
    def entrywise(self) -> Entrywise:
        return Entrywise(_todi_entry)


def _todi_entry(log_q: Any, log_p: Any, q: Any, p: Any, a: float, b: float) -> tuple[Any, Any]:
    ratio = log_p - log_q
    share = p / clamp_min(p + q, 1e-37)
    return (share * p - (1 - share) * q) * ratio, (1 - share) * q * (1 - ratio) - share * p


todi = ToDi()
