"""The data verifies the teacher, and how far the teacher is trusted is learned from the batch. Ours.

Notation: p teacher, q student, y the data's token, r = p(y)/q(y).

`LabelRatio` accepts a token with speculative decoding's probability `min(1, r)`, whoever the teacher is. Here the odds that the
teacher is right multiply the ratio, `min(1, π/(1 − π)·r)`, and π is read off the batch as the product of two shares:

- how many of the tokens the teacher does not flatly contradict (r ≥ 1/20): a teacher that is broken here and there does;
- how much of the others' labels he explains better than the student: read each as written by the teacher, with probability s,
  or by the student; the s that makes them most likely is near 1 for a teacher that knows more than the student, and near 0 for
  one that knows less, who contradicts nothing flatly and is a little wrong everywhere.

At π = ½ this is `LabelRatio`; a clean, competent teacher is followed nearly everywhere, as without a gate; one that is worse
than the student hardly at all.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from speckd.errors import ConfigError
from speckd.gates import label_ratio
from speckd.types import Rows, TokenKeys

#: Ratios beyond say no more than this, and stay finite.
_LARGEST = 1e6
#: Below, the teacher contradicts the data.
_CONTRADICTION = 1 / 20
_HALVINGS = 40


def most_likely_share(ratio: Tensor, counted: Tensor, group: Tensor, prior: Tensor, prior_tokens: float) -> Tensor:
    """[groups] the s that maximises Σ log(s·r + 1 − s) over each group's counted rows and the prior's; by bisection.

    Args:
        ratio: [N] float64, p(y)/q(y), finite and at least 0.
        counted: [N] float64, 1 or 0.
        group: [N] int64, which group a row belongs to.
        prior: [groups], the mode of a Beta prior, in (0, 1).
        prior_tokens: how many tokens it weighs as much as.
    """
    low, high = torch.zeros_like(prior), torch.ones_like(prior)
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        slope = prior_tokens * (prior / share - (1 - prior) / (1 - share))
        slope = slope.index_add(0, group, counted * (ratio - 1) / (share[group] * (ratio - 1) + 1))
        low, high = torch.where(slope > 0, share, low), torch.where(slope > 0, high, share)
    return (low + high) / 2


def share_of(counted: Tensor, group: Tensor, prior: Tensor, prior_tokens: float) -> Tensor:
    """[groups] how many of each group's rows are counted, the prior's tokens among them; arguments as above."""
    rows = torch.zeros_like(prior).index_add(0, group, torch.ones_like(counted))
    found = torch.zeros_like(prior).index_add(0, group, counted)
    return (found + prior_tokens * prior) / (rows + prior_tokens)


def sharpened(share: Tensor) -> Tensor:
    """The odds squared: who is better is better, by however little, and gets more than in proportion."""
    return share**2 / (share**2 + (1 - share) ** 2)


@dataclass(frozen=True)
class Trust:
    """Weight `min(1, π/(1 − π)·p(y)/q(y))`, with the trust π in the teacher learned from the batch: a `BatchGate`.

    Args:
        prior: what both shares are believed to be before the batch is seen, in (0, 1).
        prior_tokens: how many tokens that belief weighs as much as.
        per_sequence: each sequence has shares of its own, with the batch's as their prior: where the teacher is good at some
            of the data only.
    """

    prior: float = 0.95
    prior_tokens: float = 10.0
    per_sequence: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.prior < 1:
            raise ConfigError(f"prior is {self.prior}", "Use a share between 0 and 1, neither included")
        if not 0 < self.prior_tokens < math.inf:
            raise ConfigError(f"prior_tokens is {self.prior_tokens}", "Use a number of tokens above 0")

    @property
    def notation(self) -> str:
        scope = "sequence" if self.per_sequence else "batch"
        return (
            f"min(1, π/(1 − π)·p_t(y_t)/q_t(y_t)); π: the {scope}'s share that p does not contradict × explains better than q"
        )

    def score(self, rows: Rows) -> Tensor:
        return label_ratio(rows)

    def select(self, scores: Tensor, keys: TokenKeys) -> Tensor:
        ratio = scores.double().clamp(max=_LARGEST)
        sound = (ratio >= _CONTRADICTION).double()
        group, prior = torch.zeros_like(keys.sample), ratio.new_tensor([self.prior])
        upright = share_of(sound, group, prior, self.prior_tokens)
        skilled = most_likely_share(ratio, sound, group, prior, self.prior_tokens)
        if self.per_sequence:
            samples, group = keys.sample.unique(return_inverse=True)
            upright = share_of(sound, group, upright.expand(len(samples)), self.prior_tokens)
            skilled = most_likely_share(ratio, sound, group, skilled.expand(len(samples)), self.prior_tokens)
        trust = upright * sharpened(skilled)
        return (trust / (1 - trust))[group].mul(ratio).clamp(max=1).to(scores.dtype)
