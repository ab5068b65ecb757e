"""Reverse KL between the distributions of whole texts, minimised by its policy gradient on text that the student wrote."""

from dataclasses import dataclass

import torch
from torch import Tensor

from speckd.divergences import Entrywise, require_share, reverse_kl
from speckd.errors import ConfigError
from speckd.types import PolicyGradient, TokenKeys


@dataclass(frozen=True)
class SequenceReverseKL:
    """MiniLLM's gradient of KL(q(y|x) ‖ p(y|x)) (Gu et al., arXiv 2306.08543, section 2.2): at the t-th of T tokens drawn

        w_t·[∇ KL(q_t ‖ p_t) − R_{t+1}·∇ log q_t(y_t)],   R_{t+1} = Σ_{t'>t} log(p(y_t')/q(y_t'))

    the first part exact over the vocabulary (single-step decomposition, eq. 3), w and R constants, everything at temperature 1.
    As a loss the value is there for its gradient, and is no distance. T counts a sequence's supervised tokens.

    Equations were read in a translation of the paper, and beside them the authors' code (microsoft/LMOps, `minillm/`), from
    which these differ:

    - R is divided by the T − t tokens that it sums over. Eq. 6 divides by T − t − 1, which is 0 at the last token but one; the
      code divides by the number of its summands, too, but has t itself among them, although the first part has it already.
    - w multiplies both parts, as in the paper; in the code the second alone.
    - Advantages are not whitened, and rewards neither discounted, scaled nor clipped: the code does it, the equations do not.
    - The language-model loss on a pre-training corpus is left out.

    Args:
        length_normalized: R is a mean and not a sum (eq. 6).
        teacher_mix: α of teacher-mixed text, `w_t = q(y_t)/(α·p(y_t) + (1 − α)·q(y_t))`, the paper's approximation of a product
            over all tokens before; 0: the student's own text, w = 1. The settings put that of the text here.
        clip_range: ε of PPO's clipping, of which the paper says no more than that it is used. As the code has it: no second
            part where `R > 0` and `w > 1 + ε`, or `R < 0` and `w < 1 − ε`. At w = 1 nothing is clipped, since a text is
            trained on once, with the weights that wrote it. 0: off.
    """

    length_normalized: bool = True
    teacher_mix: float = 0.0
    clip_range: float = 0.2

    def __post_init__(self) -> None:
        require_share("teacher_mix", self.teacher_mix)
        if not self.clip_range >= 0:
            raise ConfigError(f"clip_range is {self.clip_range}", "Use 0 (off) or above")

    @property
    def notation(self) -> str:
        share, a = ("1/(T − t) " if self.length_normalized else ""), self.teacher_mix
        weight = f"q_t(y_t)/({a:g}·p_t(y_t) + {1 - a:g}·q_t(y_t))"
        found = f"[KL(q_t ‖ p_t) − R_t·log q_t(y_t)]; R_t = {share}Σ_(s > t) log(p_s(y_s)/q_s(y_s)), constant"
        return f"w_t·{found}; w_t = {weight}, constant, clipped by {self.clip_range:g}" if a else found

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        return reverse_kl(student, teacher)

    @property
    def entrywise(self) -> Entrywise:
        return reverse_kl.entrywise

    def policy_gradient(self, student: Tensor, teacher: Tensor, keys: TokenKeys) -> PolicyGradient:
        """As of `SequenceDivergence`."""
        own, other = student.double(), teacher.double()
        sums, counts = _following(other - own, keys)
        gain = sums / counts.clamp(min=1) if self.length_normalized else sums
        weight = 1 / (self.teacher_mix * (other - own).exp() + 1 - self.teacher_mix)
        if self.clip_range:
            beyond = ((gain > 0) & (weight > 1 + self.clip_range)) | ((gain < 0) & (weight < 1 - self.clip_range))
            gain = torch.where(beyond, 0, gain)
        return PolicyGradient(weight.to(student.dtype), gain.to(student.dtype))


def _following(rewards: Tensor, keys: TokenKeys) -> tuple[Tensor, Tensor]:
    """[N] each: the sum of rewards at the later positions of a row's sequence, and how many there are."""
    order = keys.position.argsort(stable=True)
    order = order[keys.sample[order].argsort(stable=True)]
    _, group, sizes = keys.sample[order].unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[group]
    table = rewards.new_zeros(len(sizes), int(sizes.max()) + 1)
    table[group, place] = rewards[order]
    later = table.flip(-1).cumsum(-1).flip(-1)[group, place + 1]  # added from the end: an infinite one stays in its sequence
    left = sizes[group] - place - 1
    return torch.empty_like(later).index_copy_(0, order, later), torch.empty_like(left).index_copy_(0, order, left)
