"""From logits to gradients, a few rows at a time so that they stay in the cache: policy → divergence as of `token_terms`.

What that function says by autograd is computed here by one rule. A row's loss is a function of the student's
log-probabilities; where `slope` is its derivative for them, `slope − q·Σ slope` is the derivative for the logits. A
divergence's slope comes from its closed form, or from autograd over log-probabilities alone; cross-entropy's is −1 at the
label. Rows without weight get nothing, and a policy whose fallback wants more than labels is left to `token_terms` itself.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from speckd import tiles
from speckd.comparisons import as_dense
from speckd.divergences import Entrywise, HasEntries
from speckd.head import LMHead
from speckd.objective import Objective, TokenTerms, token_terms
from speckd.policies import FallbackRows
from speckd.support import label_places, shared_support, teacher_support
from speckd.types import (
    BatchDivergence,
    DenseSignal,
    Divergence,
    LabelledDivergence,
    PolicyGradient,
    Rows,
    TeacherSignal,
    TokenKeys,
    TopKSignal,
)

_TOP_K_TILES = 3


@dataclass
class RowResults:
    """What was found at n rows, all [n]: the gate's verdict, and what it made necessary; NaN where it did not.

    `divergence` is without T², `fallback` without its weight.
    """

    acceptance: Tensor
    divergence: Tensor
    label_log_prob: Tensor
    fallback: Tensor

    @classmethod
    def of(cls, acceptance: Tensor) -> "RowResults":
        return cls(acceptance, *acceptance.new_full((3, len(acceptance)), torch.nan))

    @classmethod
    def joined(cls, parts: list["RowResults"], like: Tensor) -> "RowResults":
        nothing = like.new_zeros(0)
        return cls(*(torch.cat([getattr(part, f.name) for part in parts] or [nothing]) for f in fields(cls)))

    def in_order(self, places: Tensor) -> "RowResults":
        """Each row moved to its place, [n]."""
        return RowResults(
            *(torch.empty_like(own).index_copy_(0, places, own) for own in (getattr(self, f.name) for f in fields(self)))
        )

    def terms(self, objective: Objective) -> TokenTerms:
        """The loss taken apart, as `token_terms` does it."""
        share, label_weight = 1 - objective.label_loss_weight, objective.label_loss_weight
        on, fallen = token_weights(objective, self.acceptance)
        per_token = objective.divergence_temperature**2 * self.divergence
        weighed = torch.where(on != 0, on * per_token, 0)
        accepted = torch.where((on != 0) & (self.acceptance > 0), share * self.acceptance * per_token, 0)
        fallback = torch.where(fallen != 0, fallen * self.fallback, 0)
        labelled = -label_weight * self.label_log_prob if label_weight else torch.zeros_like(on)
        parts = (accepted, weighed - accepted + fallback, labelled)
        return TokenTerms(weighed + fallback + labelled, on + fallen + label_weight, self.acceptance, per_token, *parts)


def token_weights(objective: Objective, acceptance: Tensor) -> tuple[Tensor, Tensor]:
    """[n] of the divergence and of the fallback, after the label's share."""
    if not objective.needs_teacher:
        return torch.zeros_like(acceptance), torch.zeros_like(acceptance)
    on, fallen = objective.rejected.weights(acceptance)
    return (1 - objective.label_loss_weight) * on, (1 - objective.label_loss_weight) * fallen


@dataclass(frozen=True)
class JudgedRows:
    """n rows and the gate's verdict, [n]. The teacher's signal is for the first of them; the others are rejected.

    The logits of both sides are used up by the pass. `following`: where the divergence is one of whole texts.
    """

    student: DenseSignal
    teacher: TeacherSignal | None
    labels: Tensor
    keys: TokenKeys
    acceptance: Tensor
    following: PolicyGradient | None = None

    def slope_weights(self, on: Tensor) -> Tensor:
        """[n] of the divergence's gradient; `on`: [n], as of `token_weights`."""
        return on if self.following is None else on * self.following.weight

    def label_costs(self, on: Tensor) -> Tensor:
        """[n] of the label's cross-entropy, where what followed asks for it."""
        return torch.zeros_like(on) if self.following is None else self.slope_weights(on) * self.following.advantage

    def with_following(self, index: Tensor, divergence: Tensor, found: RowResults) -> Tensor:
        """[r] divergences of some rows -> what stands in their place."""
        return divergence if self.following is None else self.following.rows(index).of(divergence, found.label_log_prob[index])


@dataclass(frozen=True)
class RowPass:
    """An objective over a chunk's rows, `tile` at a time. `head`: the student's, for its cap."""

    objective: Objective
    head: LMHead
    tile: int
    by_definition: bool

    @torch.no_grad()
    def __call__(self, rows: JudgedRows, out: Tensor | None) -> tuple[RowResults, Tensor]:
        """What was found, and which rows have a gradient, [m].

        Args:
            rows: n of them.
            out: [n, V], the very place of the student's logits. Its first m rows become the gradients of the summed loss for
                the head's products, scale apart, in the order of the second result. None: no gradient is wanted.
        """
        on, fallen = token_weights(self.objective, rows.acceptance)
        found = RowResults.of(rows.acceptance)
        learns_labels = self.objective.learns_labels
        taught = ((on != 0) & (not learns_labels)) | ((fallen != 0) & self.by_definition)
        labelled = ~taught & (((on != 0) & learns_labels) | (fallen != 0) | (self.objective.label_loss_weight > 0))
        costs = on if learns_labels else rows.label_costs(on)
        label = self.label_slopes(rows, fallen, found, wanted=out is not None, costs=costs)
        on = rows.slope_weights(on)
        first, second = taught.nonzero()[:, 0], labelled.nonzero()[:, 0]
        # Packing rows of one kind never overtakes what is still to be read; of two kinds it would, so each stays in its place.
        packed = not len(second)
        # On a truncated teacher's support little more than the student's probabilities is made of a row: take more at once.
        step = _TOP_K_TILES * self.tile if isinstance(rows.teacher, TopKSignal) and not self.by_definition else self.tile
        for start in range(0, len(first), step):
            index = first[start : start + step]
            to = slice(start, start + len(index)) if packed else _span(index)
            if self.by_definition and bool((fallen[index] != 0).any()):
                self._define(rows, index, to, found, out)
            elif isinstance(rows.teacher, TopKSignal) and rows.teacher.token_ids.shape[-1] < rows.student.logits.shape[-1]:
                value = self._learn_top_k(rows, rows.teacher, index, on[index], label, to, out)
                found.divergence[index] = rows.with_following(index, value, found)
            else:
                value = self._learn_dense(rows, index, on[index], label, to, out)
                found.divergence[index] = rows.with_following(index, value, found)
        if out is None or packed:
            return found, first
        for start in range(0, len(second), self.tile):
            self._learn_label(rows, second[start : start + self.tile], label, out)
        out[(~(taught | labelled)).nonzero()[:, 0]] = 0
        return found, torch.arange(len(on), device=on.device)

    @cached_property
    def _closed_form(self) -> Entrywise | None:
        return closed_form(self.objective.token_divergence)

    @cached_property
    def _labelled(self) -> LabelledDivergence | None:
        divergence = self.objective.token_divergence
        return divergence if isinstance(divergence, LabelledDivergence) else None

    def _slope(self, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, labels: Tensor, wanted: bool) -> tuple[Tensor, Tensor]:
        """`labels`: [n], which the teacher lists where the divergence asks for them."""
        divergence = self.objective.token_divergence if self._labelled is None else self._labelled.at(labels)
        return divergence_slope(divergence, self._closed_form, log_q, log_p, q, p, wanted)

    def label_slopes(self, rows: JudgedRows, fallen: Tensor, found: RowResults, wanted: bool, costs: Tensor) -> Tensor | None:
        """[n] derivative of fallback and label loss for the label's log-probability; None where no row has either.

        `costs`: [n], the weight of the label's cross-entropy in the divergence's place or beside it.
        """
        weight, falls = self.objective.label_loss_weight, fallen.nonzero()[:, 0]
        learns = ((fallen != 0) | (costs != 0)).nonzero()[:, 0]
        if weight == 0 and not len(learns):
            return None
        needed = torch.arange(len(fallen), device=fallen.device) if weight else learns
        found.label_log_prob[needed] = rows.student.label_log_probs(needed, rows.labels[needed])
        slopes = torch.full_like(found.label_log_prob, -weight) - costs
        if self.objective.learns_labels:
            own = costs.nonzero()[:, 0]
            found.divergence[own] = -found.label_log_prob[own]
        if len(falls) and not self.by_definition:
            with torch.set_grad_enabled(wanted):
                leaf = found.label_log_prob[falls].requires_grad_(wanted)
                value = self.objective.rejected.fallback(FallbackRows(leaf, _no_support, self.objective.divergence_temperature))
            if value.requires_grad:
                slopes[falls] += fallen[falls] * torch.autograd.grad(value, leaf, torch.ones_like(value))[0]
            found.fallback[falls] = value.detach()
        return slopes

    def _learn_dense(
        self, rows: JudgedRows, index: Tensor, on: Tensor, label: Tensor | None, to: slice | Tensor, out: Tensor | None
    ) -> Tensor:
        """The divergence of some rows, [r]; their gradients into `out[to]`."""
        temperature, where = self.objective.divergence_temperature, _span(index)
        assert rows.teacher is not None
        teacher = as_dense(rows.teacher)
        student_logits, teacher_logits = rows.student.logits[where], teacher.logits[where]
        cap = self.head.slope_of_cap(student_logits)
        plain = tiles.softmax(student_logits) if label is not None and temperature != 1 else None
        q, log_q = _normalised(student_logits, rows.student.maximum[where], temperature)
        p, log_p = _normalised(teacher_logits, teacher.maximum[where], temperature)
        value, slope = self._slope(log_q, log_p, q, p, rows.labels[where], wanted=out is not None)
        if out is None:
            return value
        weight, total = (temperature * on)[:, None], slope.sum(-1, keepdim=True)  # T² of the divergence, 1/T of the logits
        if bool((weight != 1).any()):
            slope, total = slope * weight, total * weight
        if label is None and cap is None and isinstance(to, slice):
            torch.addcmul(slope, q, total, value=-1, out=out[to])
            return value
        own = None if label is None else label[index][:, None]
        if own is not None and plain is None:
            total = total + own
        gradient = slope.addcmul_(q, total, value=-1)
        if own is not None:
            gradient = gradient if plain is None else gradient.addcmul_(plain, own, value=-1)
            gradient.scatter_add_(1, rows.labels[index][:, None], own)
        out[to] = gradient if cap is None else gradient.mul_(cap)
        return value

    def _learn_top_k(
        self,
        rows: JudgedRows,
        teacher: TopKSignal,
        index: Tensor,
        on: Tensor,
        label: Tensor | None,
        to: slice | Tensor,
        out: Tensor | None,
    ) -> Tensor:
        """The same on the teacher's K tokens and a tail: what lies in the tail shares its slope, in proportion to q."""
        where, teacher = _span(index), teacher.rows(index)
        logits, ids = rows.student.logits[where], teacher.token_ids
        cap = self.head.slope_of_cap(logits)
        log_p = teacher_support(teacher, logits.shape[-1], self.objective.divergence_temperature).to(logits.dtype)
        outside = tiles.softmax(logits)
        log_mass, inside = -outside.amax(-1, keepdim=True).log(), outside.gather(-1, ids)
        outside.scatter_(-1, ids, 0)
        tail = outside.sum(-1, keepdim=True)  # with every digit, unlike 1 − Σ inside
        log_inside = logits.gather(-1, ids) - rows.student.maximum[where] - log_mass
        q, log_q = torch.cat([inside, tail], -1), torch.cat([log_inside, tail.log()], -1)
        value, slope = self._slope(log_q, log_p, q, log_p.exp(), rows.labels[where], wanted=out is not None)
        if out is None:
            return value
        slope = slope * on[:, None]
        slope = slope_against_tail(slope, inside, tail)
        total = slope.sum(-1, keepdim=True)
        if label is not None:
            total += label[index][:, None]
        gradient = out[to] if isinstance(to, slice) else torch.empty_like(outside)
        torch.mul(outside, -total, out=gradient).scatter_(-1, ids, slope - inside * total)
        if label is not None:
            gradient.scatter_add_(1, rows.labels[index][:, None], label[index][:, None])
        if cap is not None:
            gradient.mul_(cap)
        if not isinstance(to, slice):
            out[to] = gradient
        return value

    def _learn_label(self, rows: JudgedRows, index: Tensor, label: Tensor | None, out: Tensor) -> None:
        """Gradients of rows that learn from the label alone, in their places: −c·(q − δ)."""
        assert label is not None
        where, own = _span(index), label[index][:, None]
        logits = rows.student.logits[where]
        cap = self.head.slope_of_cap(logits)
        gradient = tiles.softmax(logits).mul_(-own).scatter_add_(1, rows.labels[index][:, None], own)
        out[where] = gradient if cap is None else gradient.mul_(cap)

    def _define(self, rows: JudgedRows, index: Tensor, to: slice | Tensor, found: RowResults, out: Tensor | None) -> None:
        """`token_terms`, by autograd."""
        assert rows.teacher is not None
        temperature, logits = self.objective.divergence_temperature, rows.student.logits[index]
        cap = self.head.slope_of_cap(logits)
        seen = Rows(logits, rows.teacher.rows(index), rows.labels[index], rows.keys.rows(index))
        support = partial(shared_support, logits, seen.teacher, temperature)
        found.fallback[index] = self.objective.rejected.fallback(
            FallbackRows(found.label_log_prob[index], support, temperature)
        ).to(logits.dtype)
        following = None if rows.following is None else rows.following.rows(index)
        with torch.set_grad_enabled(out is not None):
            leaf = logits.requires_grad_(out is not None)
            terms = token_terms(self.objective, replace(seen, student_logits=leaf), rows.acceptance[index], following)
            loss = terms.loss.sum()
        found.divergence[index] = terms.divergence / temperature**2
        if out is None:
            return
        gradient = torch.zeros_like(logits)
        if loss.requires_grad:
            (gradient,) = torch.autograd.grad(loss, leaf)
        out[to] = gradient if cap is None else gradient * cap


def wants_support(objective: Objective) -> bool:
    """Does the policy's fallback learn from more than the label? Asked of a row that does not count."""
    asked = []

    def support() -> tuple[Tensor, Tensor]:
        asked.append(True)
        return torch.full((1, 2), 0.5).log(), torch.full((1, 2), 0.5).log()

    objective.rejected.fallback(FallbackRows(torch.zeros(1), support, objective.divergence_temperature))
    return bool(asked)


def batch_scores(
    divergence: BatchDivergence, student: DenseSignal, teacher: TeacherSignal, labels: Tensor, temperature: float
) -> Iterator[Tensor]:
    """[n] scores of a chunk for a `BatchDivergence`, in parts: a few rows' log-probabilities at a time."""
    for some in tiles.row_slices(student.logits):
        own = teacher.rows(some)
        yield divergence.score(*shared_support(student.logits[some], own, temperature), label_places(own, labels[some]))


def _no_support() -> tuple[Tensor, Tensor]:
    raise AssertionError("such a policy goes by definition")


def _span(index: Tensor) -> slice | Tensor:
    """Row numbers, ascending; as a slice where nothing is left out, which spares a copy."""
    first, last = int(index[0]), int(index[-1])
    return slice(first, last + 1) if last - first + 1 == len(index) else index


def _normalised(logits: Tensor, maximum: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Probabilities and, in place of the logits, their logarithms."""
    if temperature != 1:
        maximum = maximum / temperature
        logits.div_(temperature)
    probs = tiles.softmax(logits)
    return probs, logits.sub_(maximum).add_(probs.amax(-1, keepdim=True).log())


def slope_against_tail(slope: Tensor, inside: Tensor, tail: Tensor) -> Tensor:
    """[n, K], what the slopes on a top-K are above the tail's, in proportion to q; `slope`: [n, K + 1], the tail's last.

    A multiple of q changes no gradient for logits; without the tail's, a tail that holds nearly everything does not cancel.
    """
    return slope[:, :-1] - inside * torch.where(tail > 0, slope[:, -1:] / tail, 0)


def closed_form(divergence: Divergence) -> Entrywise | None:
    """One entry's summand and slope, where the divergence states them. Asked once: the question costs as much as a few rows."""
    return divergence.entrywise if isinstance(divergence, HasEntries) else None


def divergence_slope(
    divergence: Divergence, form: Entrywise | None, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor, wanted: bool = True
) -> tuple[Tensor, Tensor]:
    """[n] divergence and, if wanted, its derivative for log q, [n, S], each entry by itself; `form`: by `closed_form`."""
    if form is not None:
        values, slope = form.entry(log_q, log_p, q, p, form.a, form.b)
        value = values.sum(-1)
        if math.isfinite(value.sum()):
            return value, slope
    with torch.set_grad_enabled(wanted):  # bears probabilities of 0
        leaf = log_q.detach().requires_grad_(wanted)
        value = divergence(leaf, log_p)
    if not value.requires_grad:  # not wanted, or a number that no student changes
        return value.detach(), torch.zeros_like(log_q)
    (slope,) = torch.autograd.grad(value, leaf, torch.ones_like(value))
    return value.detach(), slope.contiguous()
