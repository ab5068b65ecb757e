"""The loss, defined once: gate → policy → divergence for some rows. Whole batches and chunks call the same function."""

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from speckd.divergences import LabelNLL, forward_kl
from speckd.errors import ConfigError, NonFiniteError
from speckd.gates import AnyGate, LabelRatio
from speckd.policies import FallbackRows, Label, RejectedPolicy
from speckd.support import label_places, log_softmax, shared_support
from speckd.types import (
    BatchDivergence,
    Divergence,
    NeedsWholeTeacher,
    PolicyGradient,
    Rows,
    SequenceDivergence,
    TeacherSignal,
    TokenKeys,
    at_labels,
    needs_reference,
)

Normalizer = Literal["valid", "weight"]


@dataclass(frozen=True)
class Objective:
    """What is minimised: `(1 − λ)·[w·D(p, q) + w'·fallback] + λ·CE(y)` per token, summed, over one count.

    Args:
        gate: which tokens are accepted.
        rejected: what the others get.
        divergence: (student, teacher) log-probs -> one number per token; or one with a coefficient that is the batch's, or one
            of whole texts, or the label's cross-entropy, which the gate then weighs.
        normalizer: what the sum is divided by: "valid", the number of supervised tokens (the paper's; at low acceptance it is
            also a smaller step), or "weight", the sum of all the tokens' weights.
        label_loss_weight: λ, the share of plain cross-entropy; 1 is SFT and needs no teacher.
        divergence_temperature: T divides both sides' logits in the divergence, which is multiplied by T², so that the size
            of its gradient does not depend on T (Hinton et al. 2015). Gates and cross-entropy stay at temperature 1.
    """

    gate: AnyGate = field(default_factory=LabelRatio)
    rejected: RejectedPolicy = field(default_factory=Label)
    divergence: Divergence | BatchDivergence | LabelNLL = forward_kl
    normalizer: Normalizer = "valid"
    label_loss_weight: float = 0.0
    divergence_temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.label_loss_weight <= 1:
            raise ConfigError(f"label_loss_weight is {self.label_loss_weight}", "Use a share between 0 and 1")
        if not self.divergence_temperature > 0:
            raise ConfigError(f"divergence_temperature is {self.divergence_temperature}", "Use a temperature above 0")
        if self.normalizer not in ("valid", "weight"):
            raise ConfigError(f"normalizer is {self.normalizer!r}", "Use 'valid' (the paper's) or 'weight'")
        if self.learns_labels and self.divergence_temperature != 1:
            raise ConfigError(
                f"divergence_temperature is {self.divergence_temperature}, but label_nll is taken at temperature 1", "Remove it"
            )
        if self.divergence_temperature != 1 and isinstance(self.divergence, SequenceDivergence):
            raise ConfigError(
                f"divergence_temperature is {self.divergence_temperature}, but a divergence of whole texts is taken at "
                "temperature 1",
                "Remove it",
            )

    @property
    def needs_teacher(self) -> bool:
        return self.label_loss_weight < 1

    @property
    def needs_reference(self) -> bool:
        """Does the gate compare with a third model?"""
        return self.needs_teacher and needs_reference(self.gate)

    @property
    def learns_labels(self) -> bool:
        """Is it the data's token that accepted rows learn, and the teacher the gate's alone?"""
        return isinstance(self.divergence, LabelNLL)

    @cached_property
    def token_divergence(self) -> Divergence:
        """Of rows one by one. (Asked once: whether something follows a protocol costs as much as a few rows.)"""
        if isinstance(self.divergence, (BatchDivergence, LabelNLL)):
            raise TypeError(f"{self.divergence!r} is no divergence of rows one by one: settle it, or ask learns_labels")
        return self.divergence

    def require_support(self, teacher: TeacherSignal, vocabulary_size: int) -> None:
        """Refuses a truncated teacher where the divergence cannot do with a tail."""
        if isinstance(self.divergence, NeedsWholeTeacher) and self.divergence.needs_whole_teacher:
            why = f"{type(self.divergence).__name__} needs the whole of the teacher's distribution"
            teacher.require_whole(vocabulary_size, why, "Use a teacher that gives the whole vocabulary, or another divergence")

    def settled(self, scores: Tensor) -> "Objective":
        """With the divergence that a `BatchDivergence` settles on; `scores`: [N], of the whole batch."""
        assert isinstance(self.divergence, BatchDivergence)
        return replace(self, divergence=self.divergence.settle(scores))


@dataclass(frozen=True)
class TokenTerms:
    """The loss of N tokens, taken apart. All [N]; only `loss` carries gradient.

    `loss`: what is summed; `weight`: what "weight" counts; `acceptance`: the gate's verdict; `divergence`: D before any weight
    (of whole texts: what stands in its place for the gradient's sake, and is no distance) and NaN where a zero weight made it
    unnecessary; `accepted_loss`, `rejected_loss`, `label_loss`: the parts of `loss` from accepted weight, from rejected weight
    (down-weighted or fallback) and from `label_loss_weight`.
    """

    loss: Tensor
    weight: Tensor
    acceptance: Tensor
    divergence: Tensor
    accepted_loss: Tensor
    rejected_loss: Tensor
    label_loss: Tensor


def token_terms(objective: Objective, rows: Rows, acceptance: Tensor, following: PolicyGradient | None = None) -> TokenTerms:
    """Weigh and diverge. Gradient flows to `rows.student_logits` only.

    Args:
        objective: the composition, its divergence settled.
        rows: N supervised tokens.
        acceptance: [N] from the gate, no gradient.
        following: what a `SequenceDivergence` found of the rest of their texts.
    """
    acceptance = acceptance.to(rows.student_logits.dtype)
    on, fallback_on = objective.rejected.weights(acceptance)
    share, temperature = 1 - objective.label_loss_weight, objective.divergence_temperature
    loss, divergence = torch.zeros_like(on), torch.full_like(on, torch.nan)
    accepted, rejected, labelled = torch.zeros_like(on), torch.zeros_like(on), torch.zeros_like(on)
    label_log_prob = log_softmax(rows.student_logits).gather(-1, rows.labels[:, None])[:, 0]

    # Each loss is computed at the rows that have weight for it, and at no others: a weight of 0 costs nothing, and silences an
    # infinite value together with its gradient, which multiplying by 0 would turn into NaN.
    weighed = on.nonzero()[:, 0]
    if share > 0 and weighed.numel():
        if objective.learns_labels:
            per_token = -label_log_prob[weighed]
        else:
            places = label_places(rows.teacher.rows(weighed), rows.labels[weighed])
            divergence_of = at_labels(objective.token_divergence, places)
            per_token = (temperature**2 * divergence_of(*_on_support(rows, weighed, temperature))).to(loss.dtype)
            if following is not None:
                per_token = following.rows(weighed).of(per_token, label_log_prob[weighed])
        loss = loss.index_add(0, weighed, share * on[weighed] * per_token)
        divergence = divergence.index_copy(0, weighed, per_token.detach())
        own = torch.where(acceptance[weighed] > 0, acceptance[weighed] * per_token.detach(), 0)
        accepted = accepted.index_add(0, weighed, share * own)
        rejected = rejected.index_add(0, weighed, share * (on[weighed] * per_token.detach() - own))
    fallen = fallback_on.nonzero()[:, 0]
    if share > 0 and fallen.numel():
        seen = FallbackRows(label_log_prob[fallen], lambda: _on_support(rows, fallen, temperature), temperature)
        fallback = (share * fallback_on[fallen] * objective.rejected.fallback(seen)).to(loss.dtype)
        loss = loss.index_add(0, fallen, fallback)
        rejected = rejected.index_add(0, fallen, fallback.detach())
    if objective.label_loss_weight > 0:
        labelled = objective.label_loss_weight * -label_log_prob
        loss, labelled = loss + labelled, labelled.detach()
    weight = share * (on + fallback_on) + objective.label_loss_weight
    return TokenTerms(loss, weight, acceptance, divergence, accepted, rejected, labelled)


def _on_support(rows: Rows, index: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Student and teacher log-probabilities, both [n, S], of some rows."""
    if index.numel() == len(rows.labels):
        return shared_support(rows.student_logits, rows.teacher, temperature)
    return shared_support(rows.student_logits[index], rows.teacher.rows(index), temperature)


def usable_logits(logits: Tensor) -> Tensor:
    """[N, V] -> [N] bool: False where there is NaN, +inf, or −inf throughout. A single −inf is a token that is ruled out."""
    return torch.isfinite(logits.amax(-1))  # which propagates NaN


def require_usable_logits(usable: Tensor, who: str, keys: TokenKeys) -> None:
    """Refuses rows whose logits are not; `usable`: [N], as of `usable_logits`."""
    _require(
        usable,
        keys,
        f"the {who}'s logits are NaN or infinite",
        f"If the {who} is trained, lower the learning rate; if not, load it in float32 or bfloat16 and check its weights",
    )


def require_finite_gradients(finite: Tensor, keys: TokenKeys) -> None:
    """Refuses NaN and infinite gradients of hidden states, even where the loss is finite; `finite`: [N] bool, a row's."""
    _require(
        finite,
        keys,
        "the gradient is NaN or infinite although the loss is not",
        "Use another divergence (generalized_jsd and total_variation are bounded), or lower the learning rate",
    )


def require_finite_losses(finite: Tensor, keys: TokenKeys) -> None:
    """Refuses an infinite or NaN loss: one side gives probability 0 to what the other believes in; `finite`: [N] bool."""
    _require(
        finite,
        keys,
        "the loss is NaN or infinite",
        "One model rules out (probability 0) a token that "
        "the other or the data needs: use generalized_jsd or total_variation, or lower the learning rate",
    )


def _require(good: Tensor, keys: TokenKeys, what: str, fix: str) -> None:
    if bool(good.all()):
        return
    bad = (~good).nonzero()[:, 0]
    sample, position = int(keys.sample[bad[0]]), int(keys.position[bad[0]])
    raise NonFiniteError(f"{what} at {len(bad)} of {len(good)} tokens, first in sample {sample} at position {position}", fix)
