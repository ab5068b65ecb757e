"""What travels between the parts. Shape legend, used in every docstring:

    B sequences, L positions of a sequence, N supervised tokens ("rows"), V shared vocabulary, K teacher's top-K,
    S support (V, or K plus the tail), H hidden width.

Log-probabilities are natural logarithms, losses and entropies are in nats. `-inf` is a true zero probability.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from speckd import tiles
from speckd.errors import CapabilityError

IGNORED_LABEL = -100  # the field's convention for "not supervised"
#: What helps a gate that can make do with less than the whole distribution.
ALLOW_LOWER_BOUND = (
    "Set gate_options: {allow_lower_bound: true}, which is exact inside and rejects outside, or use a teacher that gives the "
    "whole vocabulary"
)


@dataclass(frozen=True)
class TokenKeys:
    """Who each row is, for randomness by counter and for per-sequence means. `sample`, `position`: [N] int64."""

    sample: Tensor
    position: Tensor
    seed: int = 0
    epoch: int = 0

    def rows(self, index: Tensor | slice) -> "TokenKeys":
        return replace(self, sample=self.sample[index], position=self.position[index])


@dataclass(frozen=True)
class DenseSignal:
    """A whole distribution, the teacher's or the student's. `logits`: [N, V], float32 or float64, any shift.

    What several questions need (maxima of tiles, probabilities) is computed once, at the first of them.
    """

    logits: Tensor

    @cached_property
    def tile_maxima(self) -> Tensor:
        return tiles.tile_maxima(self.logits)

    @cached_property
    def maximum(self) -> Tensor:
        """[N, 1]."""
        return self.tile_maxima.amax(-1, keepdim=True)

    @cached_property
    def log_mass(self) -> Tensor:
        """log Σ exp(logits − maximum), [N, 1]; read off the largest probability, which spares a second pass of exp."""
        best = [tiles.softmax(self.logits[some]).amax(-1, keepdim=True) for some in tiles.row_slices(self.logits)]
        return -torch.cat(best or [self.logits[:, :1]]).log()

    @cached_property
    def log_probs(self) -> Tensor:
        """[N, V]: for few rows, since it holds them all."""
        return (self.logits - self.maximum).sub_(self.log_mass)

    def log_prob(self, token_ids: Tensor) -> Tensor:
        """[N, C] ids -> [N, C] log-probabilities."""
        return self.logits.gather(-1, token_ids) - self.maximum - self.log_mass

    def label_log_prob(self, labels: Tensor) -> Tensor:
        return self.log_prob(labels[:, None])[:, 0]

    def label_log_probs(self, index: Tensor, labels: Tensor) -> Tensor:
        """[m] of some rows, without a copy of them all; `labels`: [m], theirs."""
        step = tiles.rows_at_once(self.logits)
        parts = [self.rows(i).label_log_prob(y) for i, y in zip(index.split(step), labels.split(step), strict=True)]
        return torch.cat(parts or [self.logits[:0, 0]])

    def in_top_k(self, token_ids: Tensor, k: int) -> Tensor:
        """[N] ids -> [N] bool: fewer than k tokens are strictly more probable, so ties are accepted in any order."""
        own = self.logits.gather(-1, token_ids[:, None])[:, 0]
        return tiles.fewer_above_than(self.logits, self.tile_maxima, own, k) & (own > -torch.inf)

    def sample(self, draws: Tensor) -> Tensor:
        """Inverse CDF: uniforms [N, C] -> [N, C] token ids."""
        some = [tiles.sample(tiles.softmax(self.logits[part]), draws[part]) for part in tiles.row_slices(self.logits)]
        return torch.cat(some) if some else draws.long()

    def require_whole(self, vocabulary_size: int, why: str, fix: str = "") -> None:
        """It is."""

    def overlap(self, student: "DenseSignal") -> Tensor:
        """Σ_v min(p, q) = 1 − TV, [N]: the chance that one candidate drawn from the student is accepted."""
        some = [
            torch.minimum(tiles.softmax(self.logits[part]), tiles.softmax(student.logits[part])).sum(-1)
            for part in tiles.row_slices(self.logits)
        ]
        return torch.cat(some or [self.logits[:, 0]]).clamp(max=1.0)

    def entropy(self) -> Tensor:
        """[N] nats."""
        some = []
        for part in tiles.row_slices(self.logits):
            probs = tiles.softmax(self.logits[part])
            some.append(-(probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()).sum(-1))
        return torch.cat(some or [self.logits[:, 0]])

    def entropies(self, index: Tensor) -> Tensor:
        """[m] nats of some rows, one by one, for the sake of memory."""
        parts = [self.rows(slice(place, place + 1)).entropy() for place in index.tolist()]
        return torch.cat(parts or [self.logits[:0, 0]])

    def reordered(self, index: Tensor) -> "DenseSignal":
        """The signal after its logits were moved, in place: row i is what row `index[i]` was."""
        part = DenseSignal(self.logits)
        if "tile_maxima" in self.__dict__:
            part.__dict__["tile_maxima"] = self.tile_maxima[index]
        return part

    def argmax(self) -> Tensor:
        return tiles.argmax(self.logits, self.tile_maxima)

    def rows(self, index: Tensor | slice) -> "DenseSignal":
        part = DenseSignal(self.logits[index])
        if "tile_maxima" in self.__dict__:  # computed already
            part.__dict__["tile_maxima"] = self.tile_maxima[index]
        return part


@dataclass(frozen=True)
class TopKSignal:
    """The teacher's K most probable tokens and, exactly, its probability of the data's token.

    `token_ids`: [N, K] int64, distinct in a row; `log_probs`: [N, K], of the full softmax at temperature 1, so they sum to at
    most 1 and the rest is the tail; `label_log_probs`: [N] or None. What lies outside the top-K is never guessed: a proposal
    there counts as rejected, so a verdict that needs its probability is a lower bound (method.md of the docs says which do).
    `ranked`: False where the K tokens were drawn at random and not by rank: then log_probs are an estimate of a distribution
    that is 0 elsewhere, and what asks for ranks is refused.
    """

    token_ids: Tensor
    log_probs: Tensor
    label_log_probs: Tensor | None = None
    ranked: bool = True

    def log_prob(self, token_ids: Tensor) -> Tensor:
        """[N, C] ids -> [N, C] log-probabilities, −inf where the id is outside the top-K (known only to be small)."""
        self._require_ranks("any token's probability")  # log_probs are counts then
        found = token_ids[:, :, None] == self.token_ids[:, None, :]
        known = torch.where(found, self.log_probs[:, None, :], -torch.inf)
        return known.amax(-1)

    def label_log_prob(self, labels: Tensor) -> Tensor:
        if self.label_log_probs is None:
            raise CapabilityError(
                "this top-K teacher does not hold its probability of the label, and the label may lie outside the top-K",
                "Store label_log_probs with it, or use a gate that verifies the proposal only (top_k)",
            )
        return self.label_log_probs

    def in_top_k(self, token_ids: Tensor, k: int) -> Tensor:
        self._require_ranks("verify_top_k")
        if k > self.token_ids.shape[-1]:
            raise CapabilityError(
                f"verify_top_k is {k}, but the teacher gives its top {self.token_ids.shape[-1]} only",
                "Lower verify_top_k, or capture the teacher with a larger teacher_top_k",
            )
        own = self.log_prob(token_ids[:, None])
        return ((self.log_probs > own).sum(-1) < k) & (own[:, 0] > -torch.inf)

    def overlap(self, student: DenseSignal) -> Tensor:
        """Σ min(p, q) over the top-K, [N]: a lower bound of the whole overlap, since the tail's share is unknown."""
        self._require_ranks("the overlap with the student")
        return torch.minimum(student.log_prob(self.token_ids), self.log_probs).exp().sum(-1).clamp(max=1.0)

    def require_whole(self, vocabulary_size: int, why: str, fix: str = ALLOW_LOWER_BOUND) -> None:
        """Refuses what needs the probability of any token, unless the K are all there are."""
        if self.token_ids.shape[-1] < vocabulary_size:
            raise CapabilityError(f"{why}, but the teacher gives its top {self.token_ids.shape[-1]} only", fix)
        self._require_ranks("the whole distribution")

    def entropy(self) -> Tensor:
        """Entropy of the top-K and one tail bucket: a lower bound of the teacher's entropy."""
        probs = self.log_probs.exp()
        tail = (1 - probs.sum(-1)).clamp(min=0)
        return torch.special.entr(probs).sum(-1) + torch.special.entr(tail)

    def entropies(self, index: Tensor) -> Tensor:
        """[m] of some rows."""
        return self.rows(index).entropy()

    def argmax(self) -> Tensor:
        best = self.log_probs.argmax(-1, keepdim=True)
        return self.token_ids.gather(-1, best)[:, 0]

    def to(self, dtype: torch.dtype) -> "TopKSignal":
        labels = None if self.label_log_probs is None else self.label_log_probs.to(dtype)
        return replace(self, log_probs=self.log_probs.to(dtype), label_log_probs=labels)

    def rows(self, index: Tensor | slice) -> "TopKSignal":
        labels = None if self.label_log_probs is None else self.label_log_probs[index]
        return replace(self, token_ids=self.token_ids[index], log_probs=self.log_probs[index], label_log_probs=labels)

    def _require_ranks(self, what: str) -> None:
        if not self.ranked:
            raise CapabilityError(
                f"this teacher's tokens were drawn at random, so {what} cannot be known from them",
                "Use a gate that asks for the label only (label_ratio) or none, or capture the teacher's top-K",
            )


@dataclass(frozen=True)
class OptimisticSignal:
    """A few of the teacher's logits, for proofs of rejection: whatever is asked is answered in favour of acceptance.

    `token_ids`, `logits`: [N, C], without repetition of what counts twice (`distinct`, [N, C] bool, is False for repetitions).
    Ranks are counted among the known tokens only, probabilities divided by their sum only, and an unknown token may be
    anything; `margin`, [N, 1], covers the rounding between these logits and those of the whole product.
    """

    token_ids: Tensor
    logits: Tensor
    distinct: Tensor
    margin: Tensor

    def log_prob(self, token_ids: Tensor) -> Tensor:
        """[N, C'] ids -> [N, C'] upper bounds; 0 where the token is not known."""
        known = torch.where(self.distinct, self.logits, -torch.inf).logsumexp(-1, keepdim=True)
        return (self._logit(token_ids) - known + 2 * self.margin).clamp(max=0)

    def label_log_prob(self, labels: Tensor) -> Tensor:
        return self.log_prob(labels[:, None])[:, 0]

    def in_top_k(self, token_ids: Tensor, k: int) -> Tensor:
        """[N] ids -> [N] bool: fewer than k known tokens are above."""
        above = self.distinct & (self.logits > self._logit(token_ids[:, None]) + 2 * self.margin)
        return above.sum(-1) < k

    def require_whole(self, vocabulary_size: int, why: str, fix: str = "") -> None:
        """Unknown tokens are answered for."""

    def overlap(self, student: DenseSignal) -> Tensor:
        return torch.ones_like(self.margin[:, 0])

    def _logit(self, token_ids: Tensor) -> Tensor:
        """[N, C'] logits, +inf where unknown."""
        found = token_ids[:, :, None] == self.token_ids[:, None, :]
        return torch.where(found.any(-1), torch.where(found, self.logits[:, None, :], -torch.inf).amax(-1), torch.inf)


TeacherSignal: TypeAlias = DenseSignal | TopKSignal


@dataclass(frozen=True)
class Capabilities:
    """What a teacher can be asked, known before the first batch: the whole vocabulary, or its top-K (`ranked`: by rank, and not
    drawn at random). `exact_top_k`: of a whole vocabulary that was rounded, up to which k its verdicts are exact; None: all."""

    top_k: int | None = None
    ranked: bool = True
    exact_top_k: int | None = None


@dataclass(frozen=True)
class Rows:
    """What a gate sees: everything that is known of N supervised tokens. No gradient flows from here.

    `student_logits`: [N, V], float32 or float64; `labels`: [N] int64, the data's token; `reference`: what a third, frozen model
    says of the same rows, only where the gate `needs_reference`.
    """

    student_logits: Tensor
    teacher: TeacherSignal
    labels: Tensor
    keys: TokenKeys
    reference: TeacherSignal | None = None

    @cached_property
    def student(self) -> DenseSignal:
        return DenseSignal(self.student_logits)

    @cached_property
    def student_label_log_prob(self) -> Tensor:
        return self.student.label_log_prob(self.labels)

    @property
    def required_reference(self) -> TeacherSignal:
        if self.reference is None:
            raise CapabilityError(
                "the gate compares the student with a reference model, and there is none", "Set reference_model_name_or_path"
            )
        return self.reference

    @classmethod
    def of(
        cls,
        student: DenseSignal,
        teacher: TeacherSignal,
        labels: Tensor,
        keys: TokenKeys,
        reference: TeacherSignal | None = None,
    ) -> "Rows":
        """With a student's distribution of which something may be known already."""
        rows = cls(student.logits, teacher, labels, keys, reference)
        rows.__dict__["student"] = student
        return rows


class Gate(Protocol):
    """Propose and verify: how far each row is accepted, [N] in [0, 1]; 0 or 1 for the hard gates."""

    def __call__(self, rows: Rows) -> Tensor: ...


@runtime_checkable
class MonotoneGate(Gate, Protocol):
    """A gate that never accepts more where the teacher thinks less of a token: its rejections can be certified early."""

    @property
    def monotone(self) -> bool: ...


@runtime_checkable
class BatchGate(Protocol):
    """A gate that must see the whole batch: a first pass scores every row, `select` then decides over all scores at once.

    The batch is that of all processes; its rows come in any order, so that order may decide nothing.
    """

    def score(self, rows: Rows) -> Tensor:
        """[N] scores of one chunk, or [N, C] where a row needs several numbers."""
        ...

    def select(self, scores: Tensor, keys: TokenKeys) -> Tensor:
        """[N] or [N, C] scores of the whole batch -> [N] acceptance in [0, 1]."""
        ...


@runtime_checkable
class ReferenceGate(Protocol):
    """A gate, of either kind, that may look at `Rows.reference`."""

    @property
    def needs_reference(self) -> bool: ...


def needs_reference(gate: object) -> bool:
    """Does this gate compare with a reference model? One that does not say is one that does not."""
    return isinstance(gate, ReferenceGate) and gate.needs_reference


#: (student log-probs, teacher log-probs), both [N, S] and normalised -> one number per token, [N], differentiable.
Divergence: TypeAlias = Callable[[Tensor, Tensor], Tensor]


@runtime_checkable
class BatchDivergence(Protocol):
    """A divergence with a coefficient that is the whole batch's: as a `BatchGate`, every row is scored before the first is
    weighed, and `settle` then gives the divergence of this batch. No gradient flows through the scores."""

    def score(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Log-probabilities of one chunk, both [n, S], and where the data's token stands there, [n] -> [n] scores."""
        ...

    def settle(self, scores: Tensor) -> Divergence:
        """[N] scores of the whole batch, N ≥ 1."""
        ...


@runtime_checkable
class LabelledDivergence(Protocol):
    """A divergence that treats the data's token apart, asked about rows whose labels it was given before."""

    def at(self, labels: Tensor) -> Divergence:
        """`labels`: [n], where each row's token stands on the support."""
        ...


def at_labels(divergence: Divergence, labels: Tensor) -> Divergence:
    """The divergence of some rows, [n] places of their labels."""
    return divergence.at(labels) if isinstance(divergence, LabelledDivergence) else divergence


@dataclass(frozen=True)
class PolicyGradient:
    """What the rest of its text makes of a row: `w·(D − A·log q(y))` takes the place of D. No gradient flows through either.

    `weight`, `advantage`: [N], w and A.
    """

    weight: Tensor
    advantage: Tensor

    def rows(self, index: Tensor) -> "PolicyGradient":
        return PolicyGradient(self.weight[index], self.advantage[index])

    def of(self, divergence: Tensor, label_log_prob: Tensor) -> Tensor:
        """[N] from [N] each; a label that no advantage asks for, or whose weight has become 0, may be NaN."""
        asked = (self.advantage != 0) & (self.weight != 0)
        gain = torch.where(asked, self.advantage * label_log_prob, 0)
        return self.weight * (divergence - gain)


@runtime_checkable
class SequenceDivergence(Protocol):
    """A divergence of whole texts that the student wrote: called, it is its part at single tokens; the rest of its gradient is
    that of the tokens drawn, by what followed them. Every row is looked at before the first is weighed."""

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor: ...

    def policy_gradient(self, student: Tensor, teacher: Tensor, keys: TokenKeys) -> PolicyGradient:
        """Log-probabilities of the tokens drawn, both [N], N ≥ 1, of whole sequences in any order -> what belongs to each."""
        ...


@runtime_checkable
class NeedsWholeTeacher(Protocol):
    """A divergence, of a batch or not, that a top K and a tail cannot stand in for."""

    @property
    def needs_whole_teacher(self) -> bool: ...


@runtime_checkable
class HasNotation(Protocol):
    """A part that states its own formula, in the paper's notation: p_t teacher, q_t student, y_t the data's token, at t.

    What its letters stand for follows after a semicolon.
    """

    @property
    def notation(self) -> str: ...


def notation_of(part: object) -> str:
    """A part's own formula; of a part of somebody else's that states none, its name."""
    return part.notation if isinstance(part, HasNotation) else shown(part)


def shown(part: object) -> str:
    """A part in words: `TopK(verify_top_k=5)`, a function by its name, an object that says no more of itself by its class."""
    if isinstance(getattr(part, "__name__", None), str):
        return str(part.__name__)  # type: ignore[attr-defined]
    if dataclasses.is_dataclass(part):
        values = (f"{field.name}={shown(getattr(part, field.name))}" for field in dataclasses.fields(part) if field.repr)
        return f"{type(part).__name__}({', '.join(values)})"
    return type(part).__name__ if type(part).__repr__ is object.__repr__ else repr(part)


class TeacherRows(Protocol):
    """A teacher's answer for one batch, handed out chunk by chunk so that [N, V] is never held."""

    def signal(self, index: Tensor) -> TeacherSignal:
        """[n] int64 indices of the batch's flattened positions -> the signal of those rows."""
        ...


@runtime_checkable
class DenseTeacherRows(TeacherRows, Protocol):
    """A teacher with the whole vocabulary, whose logits can be written where there is room, or made for a few tokens only."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its logits: float32 or float64."""
        ...

    @property
    def vocabulary_size(self) -> int: ...

    def write_logits(self, index: Tensor, out: Tensor) -> None:
        """[n] indices: their logits into `out`, [n, V] of `dtype`."""
        ...

    def logits_at(self, index: Tensor, token_ids: Tensor) -> Tensor:
        """[n] indices, [n, C] token ids -> [n, C] logits, without those of the other tokens."""
        ...
