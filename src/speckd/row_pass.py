"""From logits to gradients, a few rows at a time so that they stay in the cache: policy → divergence as of `token_terms`.

What that function says by autograd is computed here by one rule. A row's loss is a function of the student's
log-probabilities; where `slope` is its derivative for them, `slope − q·Σ slope` is the derivative for the logits. A
divergence's slope comes from its closed form, or from autograd over log-probabilities alone; cross-entropy's is −1 at the
label. Rows without weight get nothing, and a policy whose fallback wants more than labels is left to `token_terms` itself.
"""

from dataclasses import dataclass, fields
from functools import cached_property, partial
from typing import TypeVar

import torch
from torch import Tensor

from speckd.divergences import HasEntries
from speckd.head import LMHead
from speckd.objective import Objective, TokenTerms, token_terms
from speckd.policies import FallbackRows
from speckd.support import shared_support, teacher_support
from speckd.types import DenseSignal, Divergence, Rows, TeacherSignal, TokenKeys, TopKSignal

Signal = TypeVar("Signal", bound=DenseSignal | TopKSignal)


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
        return cls(acceptance, *(torch.full_like(acceptance, torch.nan) for _ in range(3)))

    @classmethod
    def joined(cls, parts: list["RowResults"], like: Tensor) -> "RowResults":
        nothing = like.new_zeros(0)
        return cls(*(torch.cat([getattr(part, f.name) for part in parts] or [nothing]) for f in fields(cls)))

    def terms(self, objective: Objective) -> TokenTerms:
        """The loss taken apart, as `token_terms` does it."""
        share, label_weight = 1 - objective.label_loss_weight, objective.label_loss_weight
        on, fallen = _weights(objective, self.acceptance)
        per_token = objective.divergence_temperature**2 * self.divergence
        weighed = torch.where(on != 0, on * per_token, 0)
        accepted = torch.where((on != 0) & (self.acceptance > 0), share * self.acceptance * per_token, 0)
        fallback = torch.where(fallen != 0, fallen * self.fallback, 0)
        labelled = -label_weight * self.label_log_prob if label_weight else torch.zeros_like(on)
        parts = (accepted, weighed - accepted + fallback, labelled)
        return TokenTerms(weighed + fallback + labelled, on + fallen + label_weight, self.acceptance, per_token, *parts)


def _weights(objective: Objective, acceptance: Tensor) -> tuple[Tensor, Tensor]:
    """[n] of the divergence and of the fallback, after the label's share."""
    if not objective.needs_teacher:
        return torch.zeros_like(acceptance), torch.zeros_like(acceptance)
    on, fallen = objective.rejected.weights(acceptance)
    return (1 - objective.label_loss_weight) * on, (1 - objective.label_loss_weight) * fallen


@dataclass(frozen=True)
class JudgedRows:
    """n rows and the gate's verdict, [n]. `known`: [n] bool, the rows that the teacher's signal is for; None: all."""

    student: DenseSignal
    teacher: TeacherSignal | None
    known: Tensor | None
    labels: Tensor
    keys: TokenKeys
    acceptance: Tensor


@dataclass(frozen=True)
class _Group:
    """Some rows of a pass, `index` their places in it; the teacher is None where they learn from the label alone."""

    index: Tensor
    student: DenseSignal
    teacher: TeacherSignal | None
    labels: Tensor
    keys: TokenKeys


@dataclass(frozen=True)
class RowPass:
    """An objective over rows of one head."""

    objective: Objective
    head: LMHead

    @cached_property
    def by_definition(self) -> bool:
        """Does the policy's fallback learn from more than the label? Asked once, of a row that does not count."""
        asked = []

        def support() -> tuple[Tensor, Tensor]:
            asked.append(True)
            return torch.full((1, 2), 0.5).log(), torch.full((1, 2), 0.5).log()

        self.objective.rejected.fallback(FallbackRows(torch.zeros(1), support, 1.0))
        return bool(asked)

    @torch.no_grad()
    def __call__(self, rows: JudgedRows, out: Tensor | None) -> tuple[RowResults, Tensor]:
        """What was found, and which rows have a gradient, [m].

        Args:
            rows: accepted only where the teacher knows them.
            out: [≥ n, V], room for the gradients of the summed loss for the head's products, scale apart, packed in the order
                of the second result. It may lie where the logits lie: it is written last. None: no gradient is wanted.
        """
        on, fallen = _weights(self.objective, rows.acceptance)
        found = RowResults.of(rows.acceptance)
        taught = (on != 0) | ((fallen != 0) & self.by_definition)
        labelled = ~taught & ((fallen != 0) | (self.objective.label_loss_weight > 0))
        first, second = taught.nonzero()[:, 0], labelled.nonzero()[:, 0]
        apart = None
        if len(second):  # read before the others are written
            group = self._group(rows, second, with_teacher=False)
            apart = self._labelled(group, fallen[second], found, wanted=out is not None)
        if len(first):
            group, room = self._group(rows, first), None if out is None else out[: len(first)]
            if self.by_definition:
                self._define(group, rows.acceptance[first], found, room)
            else:
                self._taught(group, on[first], fallen[first], found, room)
        if out is not None and apart is not None:
            out[len(first) : len(first) + len(second)] = apart
        return found, torch.cat([first, second])

    def _group(self, rows: JudgedRows, index: Tensor, with_teacher: bool = True) -> _Group:
        teacher = None
        if with_teacher:
            assert rows.teacher is not None
            teacher = _some(rows.teacher, index if rows.known is None else (rows.known.cumsum(0) - 1)[index])
        return _Group(index, _some(rows.student, index), teacher, rows.labels[index], rows.keys.rows(index))

    # ---- rows that learn from the label alone -----------------------------------------------------------------------------

    def _labelled(self, group: _Group, fallen: Tensor, found: RowResults, wanted: bool) -> Tensor | None:
        slope = self._label_slope(group, fallen, found)
        if slope is None or not wanted:
            return None
        gradient = torch.mul(group.student.probs, -slope[:, None])
        return self._before_cap(gradient.scatter_add_(1, group.labels[:, None], slope[:, None]), group)

    def _label_slope(self, group: _Group, fallen: Tensor, found: RowResults) -> Tensor | None:
        """[m] derivative of fallback and label loss for the label's log-probability; None where no row has either."""
        weight, falls = self.objective.label_loss_weight, fallen != 0
        if weight == 0 and not bool(falls.any()):
            return None
        log_prob = group.student.label_log_prob(group.labels)
        found.label_log_prob[group.index] = log_prob
        slope = torch.full_like(log_prob, -weight)
        if bool(falls.any()):
            with torch.enable_grad():
                leaf = log_prob[falls].requires_grad_()
                value = self.objective.rejected.fallback(FallbackRows(leaf, _no_support, self.objective.divergence_temperature))
                (own,) = torch.autograd.grad(value.sum(), leaf)
            slope[falls] += fallen[falls] * own
            found.fallback[group.index[falls]] = value.detach()
        return slope

    # ---- rows that learn from the teacher ---------------------------------------------------------------------------------

    def _taught(self, group: _Group, on: Tensor, fallen: Tensor, found: RowResults, out: Tensor | None) -> None:
        label = self._label_slope(group, fallen, found)
        if isinstance(group.teacher, TopKSignal) and group.teacher.token_ids.shape[-1] < group.student.logits.shape[-1]:
            gradient = self._top_k_gradient(group, group.teacher, on, label, found, out)
        else:
            gradient = self._dense_gradient(group, _dense(group.teacher), on, label, found, out)
        if gradient is not None and out is not None and gradient is not out:
            out.copy_(self._before_cap(gradient, group))

    def _dense_gradient(
        self, group: _Group, teacher: DenseSignal, on: Tensor, label: Tensor | None, found: RowResults, out: Tensor | None
    ) -> Tensor | None:
        temperature = self.objective.divergence_temperature
        student, teacher = _at(group.student, temperature), _at(teacher, temperature)
        value, slope = _slope(self.objective.divergence, student.log_probs, teacher.log_probs, student.probs, teacher.probs)
        found.divergence[group.index] = value
        if out is None:
            return None
        total = slope.sum(-1, keepdim=True)
        weight = (temperature * on)[:, None]  # T² of the divergence, 1/T of the logits
        if bool((weight != 1).any()):
            slope, total = slope.mul_(weight), total * weight
        if label is None and self.head.softcap is None:
            return torch.addcmul(slope, student.probs, total, value=-1, out=out)
        if label is None:
            return slope.addcmul_(student.probs, total, value=-1)
        if temperature == 1:
            gradient = slope.addcmul_(student.probs, total + label[:, None], value=-1)
        else:
            gradient = slope.addcmul_(student.probs, total, value=-1).addcmul_(group.student.probs, label[:, None], value=-1)
        return gradient.scatter_add_(1, group.labels[:, None], label[:, None])

    def _top_k_gradient(
        self, group: _Group, teacher: TopKSignal, on: Tensor, label: Tensor | None, found: RowResults, out: Tensor | None
    ) -> Tensor | None:
        """On the teacher's K tokens and a tail: what lies in the tail shares its slope, in proportion to q."""
        probs, ids = group.student.probs, teacher.token_ids
        log_p = teacher_support(teacher, probs.shape[-1], self.objective.divergence_temperature)
        inside, outside = probs.gather(-1, ids), probs.scatter(-1, ids, 0)
        tail = outside.sum(-1, keepdim=True)  # with every digit, unlike 1 − Σ inside
        q, log_q = torch.cat([inside, tail], -1), torch.cat([group.student.log_prob(ids), tail.log()], -1)
        value, slope = _slope(self.objective.divergence, log_q, log_p, q, log_p.exp())
        found.divergence[group.index] = value
        if out is None:
            return None
        slope = slope * on[:, None]
        total = slope.sum(-1, keepdim=True) if label is None else slope.sum(-1, keepdim=True) + label[:, None]
        shared = torch.where(tail > 0, slope[:, -1:] / tail, 0)
        gradient = outside.mul_(shared - total).scatter_(-1, ids, slope[:, :-1] - inside * total)
        return gradient if label is None else gradient.scatter_add_(1, group.labels[:, None], label[:, None])

    def _define(self, group: _Group, acceptance: Tensor, found: RowResults, out: Tensor | None) -> None:
        """`token_terms`, by autograd, a row at a time for the sake of memory."""
        assert group.teacher is not None
        for place in range(len(acceptance)):
            one = torch.tensor([place], device=acceptance.device)
            with torch.set_grad_enabled(out is not None):
                logits = group.student.logits[one].requires_grad_(out is not None)
                rows = Rows(logits, group.teacher.rows(one), group.labels[one], group.keys.rows(one))
                terms = token_terms(self.objective, rows, acceptance[one])
                loss = terms.loss.sum()
            where, temperature = group.index[place], self.objective.divergence_temperature
            seen = Rows(logits.detach(), rows.teacher, rows.labels, rows.keys)
            found.divergence[where] = terms.divergence[0] / temperature**2
            found.label_log_prob[where] = seen.student_label_log_prob[0]
            support = partial(shared_support, seen.student_logits, seen.teacher, temperature)
            found.fallback[where] = self.objective.rejected.fallback(
                FallbackRows(seen.student_label_log_prob, support, temperature)
            )[0]
            if out is not None:
                gradient = torch.zeros_like(logits)
                if loss.requires_grad:
                    (gradient,) = torch.autograd.grad(loss, logits)
                out[place] = self._before_cap(gradient, _Group(one, seen.student, None, rows.labels, rows.keys))[0]

    def _before_cap(self, gradient: Tensor, group: _Group) -> Tensor:
        """The gradient for the head's product, scale apart, from that for the logits."""
        cap = self.head.slope_of_cap(group.student.logits)
        return gradient if cap is None else gradient.mul_(cap)


def _no_support() -> tuple[Tensor, Tensor]:
    raise AssertionError("asked for once, before: by_definition")


def _some(signal: Signal, index: Tensor) -> Signal:
    """Some rows; the signal itself, with what it has computed, where they are all of them, in order."""
    held = signal.logits if isinstance(signal, DenseSignal) else signal.token_ids
    return signal if len(index) == len(held) else signal.rows(index)  # type: ignore[return-value]


def _dense(signal: TeacherSignal | None) -> DenseSignal:
    """A top-K that is the whole vocabulary, as one; a dense signal as it is."""
    assert signal is not None
    if isinstance(signal, DenseSignal):
        return signal
    return DenseSignal(torch.empty_like(signal.log_probs).scatter_(-1, signal.token_ids, signal.log_probs))


def _at(signal: DenseSignal, temperature: float) -> DenseSignal:
    return signal if temperature == 1 else DenseSignal(signal.logits / temperature)


def _slope(divergence: Divergence, log_q: Tensor, log_p: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """[n] divergence and its derivative for log q, [n, S], each entry by itself."""
    if isinstance(divergence, HasEntries):
        form = divergence.entrywise
        values, slope = form.entry(log_q, log_p, q, p, form.a, form.b)
        value = values.sum(-1)
        if bool(torch.isfinite(value).all()):
            return value, slope
    with torch.enable_grad():  # bears probabilities of 0
        leaf = log_q.detach().requires_grad_()
        value = divergence(leaf, log_p)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), slope
