"""ATKD (Zhong et al., arXiv 2402.11890): easy and hard tokens are taught apart, and the label apart from the rest.

KL(p ‖ q) is B + (1 − p(y))·R: B is the KL of [p(y), 1 − p(y)], how likely the label y is; R that of p and q among the other
tokens, each renormalised. ATKD drops the factor, so that sure teachers teach diversity, too, and B where the teacher is sure.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from speckd.errors import ConfigError


@dataclass(frozen=True)
class AdaptiveTeaching:
    """Easy tokens λ·R, hard ones (1 − λ)·(B + R): a `BatchDivergence`.

    Hard is the upper half of the batch by 1 − p(y), the middle one and ties included, as the authors' code splits at the
    median; λ = 0.2. The code takes the mean of either half and adds them; a mean over all tokens is half of that sum, where
    both are of one size.
    """

    needs_whole_teacher: ClassVar[bool] = True
    easy_weight: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.easy_weight <= 1:
            raise ConfigError(f"easy_weight is {self.easy_weight}", "Use a share between 0 and 1 (the paper's is 0.2)")

    @property
    def notation(self) -> str:
        easy, hard = self.easy_weight, 1 - self.easy_weight
        return f"{hard:g}·(KL_binary + KL_rest) where 1 − p_t(y_t) is in the batch's upper half, else {easy:g}·KL_rest"

    def score(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return _uncertainty(teacher, labels)

    def settle(self, scores: Tensor) -> "SplitTeaching":
        ranked, hard = scores.sort(descending=True).values, (len(scores) + 1) // 2
        least = float(ranked[hard - 1])
        easiest = float(ranked[hard]) if hard < len(scores) else least
        # Between the two, so that a row computed anew is not on the other side by a rounding.
        return SplitTeaching(self.easy_weight, (least + easiest) / 2 - 8 * torch.finfo(scores.dtype).eps)


@dataclass(frozen=True)
class SplitTeaching:
    """`AdaptiveTeaching` once the border of hard tokens is known, and the rows' labels (`at`)."""

    easy_weight: float
    border: float
    labels: Tensor | None = None

    def at(self, labels: Tensor) -> "SplitTeaching":
        """For rows whose data's token is at these places of the support, [n]."""
        return replace(self, labels=labels)

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        assert self.labels is not None, "asked about rows whose labels are not known"
        hard = _uncertainty(teacher, self.labels) > self.border
        binary, rest = decoupled(student, teacher, self.labels)
        return torch.where(hard, (1 - self.easy_weight) * (binary + rest), self.easy_weight * rest)


def decoupled(student: Tensor, teacher: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """B and R, [n] each, of log-probabilities, both [n, S]; `labels`: [n], where the label stands on the support."""
    at = labels[:, None]
    own = [side.gather(-1, at)[:, 0] for side in (student, teacher)]
    others = [side.scatter(-1, at, -torch.inf) for side in (student, teacher)]
    rest = [_log_sum(side) for side in others]
    binary = _summand(own[1], own[0]) + _summand(rest[1], rest[0])
    nothing = (rest[1] == -torch.inf) | (rest[0] == -torch.inf)
    log_q, log_p = (side - total.masked_fill(nothing, 0)[:, None] for side, total in zip(others, rest, strict=True))
    return binary, torch.where(nothing, torch.where(rest[1] == -torch.inf, 0, torch.inf), _summand(log_p, log_q).sum(-1))


def _uncertainty(teacher: Tensor, labels: Tensor) -> Tensor:
    return -torch.expm1(teacher.gather(-1, labels[:, None])[:, 0])


def _log_sum(logs: Tensor) -> Tensor:
    """logsumexp, with the gradient 0 where nothing is there."""
    nothing = (logs == -torch.inf).all(-1, keepdim=True)
    return torch.logsumexp(logs.masked_fill(nothing, 0), -1).masked_fill(nothing[:, 0], -torch.inf)


def _summand(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p·log(p/q), 0 where p is 0, infinite where only q is. The inputs are masked: masked products leave NaN gradients."""
    there = log_p > -torch.inf
    p = log_p.where(there, 0)
    return torch.where(there, p.exp() * (p - log_q.where(there, 0)), 0)
