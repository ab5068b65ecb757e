"""Selective distillation's gates: the fraction of a batch's tokens, or of each sequence's, that ranks first by some score.

All are `BatchGate`s. Notation: p teacher, q student, r reference model, y the data's token, H entropy, V vocabulary; everything
at temperature 1. A fraction ρ of n tokens is the `ceil(ρ·n)` first, which is SE-KD's own count and keeps at least one; the
other papers' rounding is not known to us. Equal scores are ordered by a draw that belongs to the token, so that neither the
order of rows nor chunks nor processes decide. What each method adds to its selection stands in docs/method.md.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from speckd.comparisons import hellinger, kl, whole
from speckd.errors import ConfigError
from speckd.randomness import uniforms
from speckd.types import DenseSignal, Rows, TokenKeys

#: Of `uniforms`: apart from the gates' own draws.
_TIES = 4


def kept(scores: Tensor, keys: TokenKeys, fraction: float, lowest: bool = False, per_sequence: bool = False) -> Tensor:
    """The `ceil(fraction·n)` rows that rank first: [N] scores, no NaN -> [N] ones and zeros.

    Args:
        scores: of the whole batch, in any order.
        keys: who the rows are.
        fraction: in (0, 1].
        lowest: the smallest scores rank first.
        per_sequence: ranks within each sample, n being its rows; otherwise over the batch.
    """
    order = uniforms(keys.seed, keys.epoch, keys.sample, keys.position, draws=1, stream=_TIES)[:, 0, 0].argsort()
    order = order[scores[order].argsort(stable=True, descending=not lowest)]
    samples = keys.sample if per_sequence else torch.zeros_like(keys.sample)
    _, group, sizes = samples.unique(return_inverse=True, return_counts=True)
    order = order[group[order].argsort(stable=True)]
    own = group[order]
    rank = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[own]
    allowed = (fraction * sizes.double() - 1e-9).ceil()  # 0.7·10 is a little more than 7 in binary
    return torch.zeros_like(scores).index_copy_(0, order, (rank < allowed[own]).to(scores.dtype))


def _require_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ConfigError(f"fraction is {fraction}", "Use a fraction of the tokens above 0 and at most 1")


def _ranked(score: str, fraction: float, lowest: bool = False, per_sequence: bool = False) -> str:
    end, scope = "lowest" if lowest else "highest", "sequence" if per_sequence else "batch"
    return f"1[{score} is among the {end} {fraction:.3g} of its {scope}]"


def _teacher(rows: Rows, gate: str) -> DenseSignal:
    return whole(rows.teacher, rows.student_logits.shape[-1], f"{gate} needs the whole of the teacher's distribution")


# ---- one score -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _ByOneScore:
    """What gates with one score a row share: the fraction that is kept, which end, and of what. Defaults: the gate's."""

    fraction: float = 0.5
    lowest: bool = False
    per_sequence: bool = False

    def __post_init__(self) -> None:
        _require_fraction(self.fraction)

    def select(self, scores: Tensor, keys: TokenKeys) -> Tensor:
        return kept(scores, keys, self.fraction, self.lowest, self.per_sequence)


@dataclass(frozen=True)
class StudentEntropy(_ByOneScore):
    """Score H(q). As it stands, SE-KD's selection: per sequence the `ceil(ρ·L)` highest, ρ = 0.2.

    From the source text of the paper (arXiv 2602.01395, "Student Entropy-based Position Selection").
    """

    fraction: float = 0.2
    per_sequence: bool = True

    @property
    def notation(self) -> str:
        return _ranked("H(q_t)", self.fraction, self.lowest, self.per_sequence)

    def score(self, rows: Rows) -> Tensor:
        return rows.student.entropy()


@dataclass(frozen=True)
class TeacherEntropy(_ByOneScore):
    """Score H(p): `lowest: true` keeps where the teacher is sure. Per sequence, as SE-KD (2602.01395, table 1) compares it."""

    fraction: float = 0.2
    per_sequence: bool = True

    @property
    def notation(self) -> str:
        return _ranked("H(p_t)", self.fraction, self.lowest, self.per_sequence)

    def score(self, rows: Rows) -> Tensor:
        return _teacher(rows, "teacher_entropy").entropy()


@dataclass(frozen=True)
class TotalVariation(_ByOneScore):
    """Score TV(p, q) = ½ Σ|p − q|: `lowest: true` keeps where they agree most. Per batch."""

    @property
    def notation(self) -> str:
        return _ranked("TV(p_t, q_t)", self.fraction, self.lowest, self.per_sequence)

    def score(self, rows: Rows) -> Tensor:
        return 1 - _teacher(rows, "total_variation").overlap(rows.student)


@dataclass(frozen=True)
class HellingerDistance(_ByOneScore):
    """Score √(½ Σ(√p − √q)²): AdaKD's selection, the fraction r of the batch (arXiv 2510.11615).

    There r follows a moving average of the loss; here it is given. 0.5 is the default of the authors' code.
    """

    @property
    def notation(self) -> str:
        return _ranked("Hellinger(p_t, q_t)", self.fraction, self.lowest, self.per_sequence)

    def score(self, rows: Rows) -> Tensor:
        return hellinger(_teacher(rows, "hellinger"), rows.student)


@dataclass(frozen=True)
class LabelUncertainty(_ByOneScore):
    """Score 1 − p(y): ATKD's "hard" tokens, the upper half of the batch (arXiv 2402.11890); `lowest: true` keeps the easy ones.

    The authors' code splits at the median, where the middle one of an odd count is hard: `ceil` says the same.
    """

    @property
    def notation(self) -> str:
        return _ranked("1 − p_t(y_t)", self.fraction, self.lowest, self.per_sequence)

    def score(self, rows: Rows) -> Tensor:
        return -torch.expm1(rows.teacher.label_log_prob(rows.labels))


# ---- two scores, each put on one scale over the batch ----------------------------------------------------------------------


def unit_scale(values: Tensor) -> Tensor:
    """[N] moved and stretched to [0, 1] by their finite minimum and maximum; infinite ones are 1, equal ones all 0."""
    finite = values[values.isfinite()]
    if not len(finite):
        return torch.ones_like(values)
    low, high = finite.min(), finite.max()
    scaled = torch.where(values > low, (values - low) / (high - low), 0)  # equal ones are not divided
    return scaled.clamp(max=1)


@dataclass(frozen=True)
class EntropyOrDivergence:
    """TIP: unsure, or sure and wrong. Score ĥ + δ̂ − ĥ·δ̂ of h = H(q)/log V, its upper 2 % clipped, and δ = KL(q ‖ p).

    Both are put on [0, 1] by their minimum and maximum over the batch (which undoes the division by log V); the fraction ρ of
    the batch with the highest scores is kept (arXiv 2604.14084). Formula and defaults are from notes on the paper, whose body
    could not be read; that the batch is what is normalised over is part of them.
    """

    fraction: float = 0.5
    clipped: float = 0.02

    def __post_init__(self) -> None:
        _require_fraction(self.fraction)
        _require_clip(self.clipped)

    @property
    def notation(self) -> str:
        return _ranked("h + δ − h·δ, h of H(q_t), δ of KL(q_t ‖ p_t)", self.fraction)

    def score(self, rows: Rows) -> Tensor:
        """[N, 2]: H(q), KL(q ‖ p)."""
        return torch.stack([rows.student.entropy(), kl(rows.student, _teacher(rows, "tip"))], -1)

    def select(self, scores: Tensor, keys: TokenKeys) -> Tensor:
        entropy, divergence = scores.unbind(-1)
        if len(entropy):
            entropy = entropy.clamp(max=entropy.quantile(1 - self.clipped))
        a, b = unit_scale(entropy), unit_scale(divergence)
        return kept(a + b - a * b, keys, self.fraction)


@dataclass(frozen=True)
class Teachability:
    """TA-OPD: the teacher corrects among what the student considers. Score N(KL)·N(C), C = Σ p(v) over the student's top K.

    N clips to the 5 % and 95 % quantiles of the batch and puts on [0, 1]; K = 16; the fraction 0.05 of the batch with the
    highest scores is kept (arXiv 2605.26844). Formula and defaults are from notes on the paper, whose body was not read.
    Which KL is not known: KL(q ‖ p) by default, which on-policy distillation minimises, or `forward: true`, KL(p ‖ q).
    """

    fraction: float = 0.05
    student_top_k: int = 16
    clipped: float = 0.05
    forward: bool = False

    def __post_init__(self) -> None:
        _require_fraction(self.fraction)
        _require_clip(self.clipped)
        if self.student_top_k < 1:
            raise ConfigError(f"student_top_k is {self.student_top_k}", "Use student_top_k of at least 1 (the paper's is 16)")

    @property
    def notation(self) -> str:
        divergence = "KL(p_t ‖ q_t)" if self.forward else "KL(q_t ‖ p_t)"
        return _ranked(f"N({divergence})·N(p_t of q_t's top {self.student_top_k})", self.fraction)

    def score(self, rows: Rows) -> Tensor:
        """[N, 2]: KL, C."""
        teacher, student = _teacher(rows, "teachability"), rows.student
        considered = student.logits.topk(min(self.student_top_k, student.logits.shape[-1]), dim=-1).indices
        divergence = kl(teacher, student) if self.forward else kl(student, teacher)
        return torch.stack([divergence, teacher.log_prob(considered).exp().sum(-1)], -1)

    def select(self, scores: Tensor, keys: TokenKeys) -> Tensor:
        divergence, considered = (self._clip(column) for column in scores.unbind(-1))
        return kept(divergence * considered, keys, self.fraction)

    def _clip(self, values: Tensor) -> Tensor:
        finite = values[values.isfinite()]
        if len(finite):
            values = values.clamp(finite.quantile(self.clipped), finite.quantile(1 - self.clipped))
        return unit_scale(values)


def _require_clip(clipped: float) -> None:
    if not 0 <= clipped < 0.5:
        raise ConfigError(f"clipped is {clipped}", "Use a share of the tokens of at least 0 and below 0.5")


# ---- against a reference model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExcessDivergence(_ByOneScore):
    """AdaSPEC: score KL(p ‖ q) − KL(p ‖ r), the highest fraction 0.4 of the batch (arXiv 2510.19779).

    r is a student distilled from the same teacher before: tokens where it has come nearer than q can be learnt. That the batch
    and not the sequence is ranked is our reading; `per_sequence: true` is the other.
    """

    needs_reference: ClassVar[bool] = True
    fraction: float = 0.4

    @property
    def notation(self) -> str:
        return _ranked("KL(p_t ‖ q_t) − KL(p_t ‖ r_t)", self.fraction, self.lowest, self.per_sequence)

    def score(self, rows: Rows) -> Tensor:
        teacher, width = _teacher(rows, "excess_divergence"), rows.student_logits.shape[-1]
        reference = whole(rows.required_reference, width, "excess_divergence needs the whole of the reference's distribution")
        return _difference(kl(teacher, rows.student), kl(teacher, reference))


@dataclass(frozen=True)
class ExcessLabelLoss(_ByOneScore):
    """Rho-1's selection: score log r(y) − log q(y), the excess of the student's cross-entropy over a reference model's.

    The highest fraction 0.6 of the batch is kept (arXiv 2404.07965). The teacher is not asked. Rho-1 itself trains those by
    cross-entropy; here they are distilled.
    """

    needs_reference: ClassVar[bool] = True
    fraction: float = 0.6

    @property
    def notation(self) -> str:
        return _ranked("log r_t(y_t) − log q_t(y_t)", self.fraction, self.lowest, self.per_sequence)

    def score(self, rows: Rows) -> Tensor:
        return _difference(rows.required_reference.label_log_prob(rows.labels), rows.student_label_log_prob)


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """0 where both are the same infinity: then nothing is known of an excess."""
    return (one - other).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
