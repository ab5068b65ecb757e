"""The objective over a batch, chunk by chunk: hidden states and heads in, never [tokens, vocabulary].

Only what is needed is computed. Supervised rows are compacted before any product; gradients are made in the forward pass, where
the logits are, and packed, so that a rejected row costs nothing after its verdict; they wait until a chunk of them is full for
the products that end in hidden states and weights. Teacher rows whose rejection is certified are not projected.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from speckd import kernels
from speckd.batch_verdicts import Gather, alone, everybody, verdicts
from speckd.divergences import HasEntries
from speckd.early_rejection import EarlyRejection
from speckd.errors import ConfigError, NonFiniteError
from speckd.head import LMHead, add_product
from speckd.large import room
from speckd.objective import (
    Objective,
    TokenTerms,
    require_finite_gradients,
    require_finite_losses,
    require_usable_logits,
)
from speckd.row_pass import JudgedRows, RowPass, RowResults, batch_scores, wants_support
from speckd.spans import DIVERGENCE, EARLY_REJECTION, GATE, HEAD_GRADIENTS, STUDENT_HEAD, TEACHER_HEAD, span
from speckd.tokens import SupervisedRows
from speckd.types import (
    BatchDivergence,
    BatchGate,
    DenseSignal,
    DenseTeacherRows,
    MonotoneGate,
    PolicyGradient,
    Rows,
    SequenceDivergence,
    TeacherRows,
    TeacherSignal,
    TokenKeys,
    TopKSignal,
)

#: For a chunk's logits of student and teacher together. A GPU is idle while a chunk is prepared: fewer and larger ones there.
_BUDGET_BYTES = {"cpu": 256 * 2**20}
_BUDGET_ELSEWHERE = 2 * 2**30
DEFAULT_EARLY_REJECTION = EarlyRejection()
#: Rows from which the products are no faster for being larger.
_ENOUGH_ROWS = {"cpu": 320, "cuda": 4096}
#: What a few rows' logits may take to stay in a core's cache.
_TILE_BYTES = 2**20
#: A tile takes up to nine times its size; this keeps it to a tenth of a chunk.
_TILES_OF_A_CHUNK = 80


@dataclass(frozen=True)
class LossOutput:
    """Sum and count, to be divided once, by the global count; and what happened at each token, [N], for the metrics.

    `sum`: the batch's loss, differentiable once; `count`: its denominator by the objective's normaliser, no gradient;
    `teacher_entropy`: nats, at every `DIAGNOSED`-th token, picked by who it is; NaN elsewhere.
    """

    sum: Tensor
    count: Tensor
    rows: SupervisedRows
    terms: TokenTerms
    teacher_entropy: Tensor


#: One token in so many has its teacher's entropy measured, whatever the gate says of it.
DIAGNOSED = 32


def default_chunk_size(vocabulary_size: int, device_type: str = "cpu", budget_bytes: int | None = None) -> int:
    """Rows whose logits, of student and teacher in float32, fill the budget; no more than speed needs, and at least 16.

    Args:
        vocabulary_size: of the shared vocabulary.
        device_type: where, such as "cpu" or "cuda".
        budget_bytes: by default 256 MiB on a CPU, 2 GiB elsewhere.
    """
    if budget_bytes is None:
        budget_bytes = _BUDGET_BYTES.get(device_type, _BUDGET_ELSEWHERE)
    enough = max(_ENOUGH_ROWS.get(device_type, 4096), 8 * 2**20 // (8 * vocabulary_size))
    return max(16, min(enough, budget_bytes // (8 * vocabulary_size)))


def distillation_loss(
    objective: Objective,
    student_hidden: Tensor,
    student_head: LMHead,
    teacher: TeacherRows | None,
    rows: SupervisedRows,
    chunk_size: int | None = None,
    early_rejection: EarlyRejection | None = DEFAULT_EARLY_REJECTION,
    reference: TeacherRows | None = None,
    gather: Gather = alone,
) -> LossOutput:
    """The objective's (sum, count) over the supervised rows of a batch.

    Args:
        objective: what is minimised.
        student_hidden: [B·L, H], the student's last hidden states of the flattened batch, with gradient or without.
        student_head: the student's head on the shared vocabulary; frozen parameters get no gradient and cost none.
        teacher: answers for indices into the flattened batch; None only where the objective needs no teacher.
        rows: which of the B·L positions are supervised, by `tokens.supervised_rows`.
        chunk_size: rows at once; by default, as of `default_chunk_size`. The result does not depend on it.
        early_rejection: how rejections are proved without the teacher's projection; None: not at all. Changes no verdict.
        reference: a third model's answers, as the teacher's; needed where the gate `needs_reference`, and else not asked.
        gather: has a `BatchGate` judge the rows of all processes together, all of which must then call this equally often, also
            with no rows.

    Raises:
        ConfigError: the gate needs a reference model, and there is none.
        NonFiniteError: NaN or infinite logits or losses; nothing has been accumulated then.
    """
    if objective.needs_reference and reference is None:
        raise ConfigError("the gate compares the student with a reference model, and there is none", "Pass reference")
    chunk_size = chunk_size or default_chunk_size(student_head.weight.shape[0], student_hidden.device.type)
    gradients = _Gradients.wanted(student_hidden, student_head)
    with torch.no_grad(), torch.autocast(student_hidden.device.type, enabled=False):
        batch = _Batch(
            objective,
            student_hidden.detach(),
            student_head.detached(),
            teacher,
            rows,
            chunk_size,
            early_rejection,
            gradients,
            reference if objective.needs_reference else None,
            gather,
        )
        terms = batch.run().terms(objective)
        batch.largest.require_finite(terms.loss, rows.keys)
        total = terms.loss.double().sum().to(batch.dtype)
        if not bool(torch.isfinite(total)):
            raise NonFiniteError("the summed loss exceeds float32", "Lower the learning rate: the logits are out of bounds")
        count = terms.weight.sum() if objective.normalizer == "weight" else total.new_tensor(len(rows))
    return LossOutput(gradients.tied_to(total, student_hidden, student_head), count, rows, terms, batch.entropy)


@dataclass
class _Gradients:
    """Those that somebody waits for, of the summed loss; in at least float32, since sums in bfloat16 would be biased."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    weight_is_empty: bool = True  # the first product is written, not added to zeros

    @classmethod
    def wanted(cls, hidden: Tensor, head: LMHead) -> "_Gradients":
        def space(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or not tensor.requires_grad or not torch.is_grad_enabled():
                return None
            return room(tuple(tensor.shape), dtype, tensor.device)

        dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.weight.dtype), torch.float32)

        found = cls(space(hidden), space(head.weight), space(head.bias))
        for gradient in (found.hidden, found.bias):
            if gradient is not None:
                gradient.zero_()
        return found

    def __bool__(self) -> bool:
        return any(gradient is not None for gradient in (self.hidden, self.weight, self.bias))

    def tied_to(self, total: Tensor, hidden: Tensor, head: LMHead) -> Tensor:
        """The sum, with these as its gradients."""
        pairs = ((self.hidden, hidden), (self.weight, head.weight), (self.bias, head.bias))
        if self.weight is not None and self.weight_is_empty:
            self.weight.zero_()
        known = [(gradient, source) for gradient, source in pairs if gradient is not None]
        return _Precomputed.apply(total, [g for g, _ in known], *[s for _, s in known]) if known else total


@dataclass(frozen=True)
class _Largest:
    """What is not finite wherever anything is not, [N] each: the largest logits of a row, the norm of its gradient.

    Looked at once a batch: a GPU is kept waiting by every look.
    """

    student: Tensor
    teacher: Tensor
    gradient: Tensor

    @classmethod
    def of(cls, like: Tensor) -> "_Largest":
        return cls(*like.new_zeros(3, len(like)))

    def require_finite(self, losses: Tensor, keys: TokenKeys) -> None:
        """Nothing is said where all is finite; else what went wrong first, logits before losses before gradients."""
        if bool(torch.isfinite(self.student + self.teacher + self.gradient + losses).all()):
            return
        self.require_finite_logits(keys)
        require_finite_losses(torch.isfinite(losses), keys)
        require_finite_gradients(torch.isfinite(self.gradient), keys)

    def require_finite_logits(self, keys: TokenKeys) -> None:
        require_usable_logits(torch.isfinite(self.student), "student", keys)
        require_usable_logits(torch.isfinite(self.teacher), "teacher", keys)


@dataclass
class _Batch:
    """One batch on its way through the engine. A chunk's logits become, row by row and in place, packed gradients."""

    objective: Objective
    hidden: Tensor
    head: LMHead
    teacher: TeacherRows | None
    rows: SupervisedRows
    chunk_size: int
    early_rejection: EarlyRejection | None
    gradients: _Gradients
    reference: TeacherRows | None
    gather: Gather

    def __post_init__(self) -> None:
        self.dtype = torch.promote_types(torch.promote_types(self.hidden.dtype, self.head.weight.dtype), torch.float32)
        self.entropy = torch.full((len(self.rows),), torch.nan, dtype=self.dtype, device=self.hidden.device)
        shape = (min(self.chunk_size, len(self.rows)), self.head.weight.shape[0])
        # Where several chunks are needed, the student's space holds more rows than are asked for at once: those whose gradients
        # wait for the next ones. Four fifths are as fast as all of it, and the teacher's space is so much smaller.
        self.most = self.chunk_size if len(self.rows) <= self.chunk_size else max(1, self.chunk_size * 4 // 5)
        self.student_space = room(shape, self.dtype, self.hidden.device)
        self.teacher_space = None
        if self.objective.needs_teacher:
            self.teacher_space = room((min(shape[0], self.most), shape[1]), self.dtype, self.hidden.device)
        self.largest = _Largest.of(self.entropy)
        self.numbers = torch.arange(len(self.rows), device=self.hidden.device)
        self.following: PolicyGradient | None = None
        self.waiting: list[Tensor] = []  # which rows the gradients at the head of student_space belong to

    @cached_property
    def row_pass(self) -> RowPass:
        """By the objective as it is once its divergence is settled."""
        rows, width = self.student_space.shape
        by_definition = wants_support(self.objective)
        closed = isinstance(self.objective.divergence, HasEntries) and not by_definition
        of_a_chunk = rows // (_TILES_OF_A_CHUNK if closed else 3 * _TILES_OF_A_CHUNK)
        small, large = (_TILE_BYTES // (share * 4 * width) for share in (4, 1))
        tile = max(1, small, min(large, of_a_chunk))
        return kernels.row_pass(self.objective, self.head, tile, by_definition, self.student_space)

    def run(self) -> RowResults:
        """What was found, row by row; whether it is finite, `largest` says."""
        judged = self._first_pass()
        orders, parts, start = [], [], 0
        while start < len(self.rows):
            held = sum(map(len, self.waiting))
            left, free = len(self.rows) - start, min(self.most, self.chunk_size - held)
            count = -(-left // -(-left // free))  # as few chunks as there is room for, of equal size: small products are slow
            order, found = self._judge_and_weigh(slice(start, start + count), judged, held)
            start += count
            orders.append(order)
            parts.append(found)
            if start == len(self.rows) or sum(map(len, self.waiting)) > self.chunk_size // 2:
                self._flush()
        return RowResults.joined(parts, self.entropy).in_order(torch.cat(orders)) if parts else RowResults.of(self.entropy)

    # ---- logits -----------------------------------------------------------------------------------------------------------

    def _student(self, some: slice, held: int) -> DenseSignal:
        """Logits of some rows, behind the gradients that wait."""
        index = self.rows.index[some]
        space = self.student_space[held : held + len(index)]
        with span(STUDENT_HEAD):
            self.head.write(self.hidden[index], space)
        student = self._signal(space)
        self.largest.student[some] = student.maximum[:, 0]
        return student

    def _teacher(self, number: Tensor | slice, index: Tensor) -> TeacherSignal:
        """Of the rows of these numbers, at this `index` of the batch; in a space of the engine's own, which may be used up."""
        assert self.teacher is not None
        assert self.teacher_space is not None
        with span(TEACHER_HEAD):
            space = self.teacher_space[: len(index)]
            if isinstance(self.teacher, DenseTeacherRows):
                self.teacher.write_logits(index, space)
            else:
                signal = self.teacher.signal(index)
                if isinstance(signal, TopKSignal):
                    return signal.to(self.dtype)  # it may be stored in 16 bits
                space.copy_(signal.logits)
        signal = self._signal(space)
        self.largest.teacher[number] = signal.maximum[:, 0]
        return signal

    def _signal(self, logits: Tensor) -> DenseSignal:
        return kernels.signal(logits, self.objective.divergence_temperature)

    def _first_pass(self) -> Tensor | None:
        """What a `BatchGate` and a `BatchDivergence` find out of every row, of all processes, before the first is weighed; and
        what followed a row, for a `SequenceDivergence`, whose sequences are whole in a process.

        The verdicts, [N], None where rows are judged one by one; the divergence is settled.
        """
        gate, divergence, temperature = self.objective.gate, self.objective.divergence, self.objective.divergence_temperature
        ranks, settles = isinstance(gate, BatchGate), isinstance(divergence, BatchDivergence)
        if not self.objective.needs_teacher or not (ranks or settles or isinstance(divergence, SequenceDivergence)):
            return None
        scores: list[Tensor] = []
        distances: list[Tensor] = []
        drawn: list[Tensor] = []
        # No gradient waits yet: where a reference is needed, its logits take the other half of the student's space.
        step = self.most if self.reference is None else max(1, min(self.most, len(self.student_space) // 2))
        for start in range(0, len(self.rows), step):
            some = slice(start, min(len(self.rows), start + step))
            part = self.rows.rows(some)
            student, teacher = self._student(some, 0), self._teacher(some, part.index)
            self.objective.require_support(teacher, student.logits.shape[-1])
            if isinstance(gate, BatchGate):
                reference = self._reference(part, self.student_space[len(part) :])
                scores.append(gate.score(Rows.of(student, teacher, part.labels, part.keys, reference)))
            if isinstance(divergence, BatchDivergence):
                distances += batch_scores(divergence, student, teacher, part.labels, temperature)
            if isinstance(divergence, SequenceDivergence):
                drawn.append(torch.stack([side.label_log_prob(part.labels).to(self.dtype) for side in (student, teacher)]))
        self.largest.require_finite_logits(self.rows.keys)  # NaN has no rank
        if settles:
            every, _ = everybody(self._joined(distances), self.gather)
            self.objective = self.objective.settled(every) if len(self.rows) else self.objective
        if isinstance(divergence, SequenceDivergence) and drawn:
            own, other = torch.cat(drawn, -1)
            self.following = divergence.policy_gradient(own, other, self.rows.keys)
        if not isinstance(gate, BatchGate):
            return None
        return verdicts(gate, self._joined(scores), self.rows.keys, self.gather).to(self.dtype)

    def _joined(self, parts: list[Tensor]) -> Tensor:
        """[N] or [N, C] of this process, in the precision of all."""
        return torch.cat(parts).to(self.dtype) if parts else self.entropy

    def _reference(self, rows: SupervisedRows, space: Tensor | None = None) -> TeacherSignal | None:
        """Where one is asked for; its logits in a given space, if they find room there."""
        if self.reference is None:
            return None
        if space is not None and len(space) >= len(rows) and isinstance(self.reference, DenseTeacherRows):
            self.reference.write_logits(rows.index, space[: len(rows)])
            signal: TeacherSignal = DenseSignal(space[: len(rows)])
        else:
            signal = self.reference.signal(rows.index)
        if isinstance(signal, DenseSignal):
            require_usable_logits(torch.isfinite(signal.maximum[:, 0]), "reference model", rows.keys)
            return signal
        return signal.to(self.dtype)

    # ---- verdicts, weights, gradients of logits ----------------------------------------------------------------------------

    def _judge_and_weigh(self, some: slice, verdicts: Tensor | None, held: int) -> tuple[Tensor, RowResults]:
        """A chunk's rows in the order in which they were handled, and what was found.

        The gradients of those that have one are left behind the `held` that wait.
        """
        part, numbers = self.rows.rows(some), self.numbers[some]
        student, teacher = self._student(some, held), None
        if self.objective.needs_teacher:
            order, possible = self._possible_first(student, part)
            if order is not None:
                part, numbers, student = part.rows(order), numbers[order], student.reordered(order)
            first, judged = slice(possible), part.rows(slice(possible))
            teacher = self._teacher(numbers[first], judged.index)
            self._diagnose(teacher, some, order)
            known = None if verdicts is None else verdicts[numbers[first]]
            acceptance = self._judge(student.rows(first), teacher, judged, known)
            acceptance = torch.nn.functional.pad(acceptance, (0, len(part) - possible))  # what is certified is rejected
        else:
            acceptance = self.entropy.new_full((len(part),), torch.nan)
        with span(DIVERGENCE):
            out = self.student_space[held : held + len(numbers)] if self.gradients else None
            following = None if self.following is None else self.following.rows(numbers)
            found, live = self.row_pass(JudgedRows(student, teacher, part.labels, part.keys, acceptance, following), out)
        if out is not None and len(live):
            self.waiting.append(numbers[live])
        return numbers, found

    def _judge(self, student: DenseSignal, teacher: TeacherSignal, rows: SupervisedRows, verdicts: Tensor | None) -> Tensor:
        if verdicts is not None:
            return verdicts
        gate = self.objective.gate
        assert not isinstance(gate, BatchGate)
        with span(GATE):
            return gate(Rows.of(student, teacher, rows.labels, rows.keys, self._reference(rows))).to(self.dtype)

    def _possible_first(self, student: DenseSignal, rows: SupervisedRows) -> tuple[Tensor | None, int]:
        """Certified rejections moved behind the other rows, logits included: the new order, and how many may be accepted.

        None where nothing was moved.
        """
        gate, teacher, certify = self.objective.gate, self.teacher, self.early_rejection
        if certify is None or not isinstance(gate, MonotoneGate) or not gate.monotone or not self._spares_rejected:
            return None, len(rows)
        if not isinstance(teacher, DenseTeacherRows) or self.reference is not None:
            return None, len(rows)
        least = certify.worth_it(teacher.vocabulary_size, self.hidden.device.type)
        if least >= 1:
            return None, len(rows)
        with span(EARLY_REJECTION):
            possible = certify.possible(gate, student, teacher, rows.index, rows.labels, rows.keys)
            if float((~possible).double().mean()) < least:
                self.early_rejection = None  # nor will it pay in this batch's other chunks
            possible |= _diagnosed(rows.keys)
            count = int(possible.sum())
            holes, movers = (~possible[:count]).nonzero()[:, 0], possible[count:].nonzero()[:, 0] + count
            kernels.swap_rows(student.logits, holes, movers, needed=self._teaches_rejected)
            order = torch.arange(len(rows), device=possible.device)
            order[holes], order[movers] = movers, holes
        return order, count

    @cached_property
    def _spares_rejected(self) -> bool:
        """Has a rejected row no use for the teacher?"""
        on, fallen = self.objective.rejected.weights(torch.zeros(1))
        return float(on) == 0 and not (self.row_pass.by_definition and float(fallen) != 0)

    @cached_property
    def _teaches_rejected(self) -> bool:
        """Does a rejected row learn from its label?"""
        return self.objective.label_loss_weight > 0 or float(self.objective.rejected.weights(torch.zeros(1))[1]) != 0

    @cached_property
    def _diagnosed_rows(self) -> tuple[Tensor, list[int]]:
        """The numbers of the rows whose teacher's entropy is measured, here and on the CPU."""
        found = _diagnosed(self.rows.keys).nonzero()[:, 0]
        return found, found.tolist()

    def _diagnose(self, teacher: TeacherSignal, some: slice, order: Tensor | None) -> None:
        """Measures a chunk's; all are among the rows that the teacher answered for."""
        every, numbers = self._diagnosed_rows
        own = every[bisect_left(numbers, some.start) : bisect_left(numbers, some.stop)]
        if len(own):
            places = own - some.start
            self.entropy[own] = teacher.entropies(places if order is None else order[places])  # swaps undo themselves

    # ---- gradients of hidden states and head ---------------------------------------------------------------------------------

    def _gradients_to_multiply(self, count: int) -> Tensor:
        """The packed gradients; rounded where a GPU multiplies in 16 bits, over the teacher's spent logits if there are any."""
        gradients, dtype = self.student_space[:count], self.head.weight.dtype
        if gradients.device.type != "cuda" or not self.hidden.dtype == dtype != gradients.dtype:
            return gradients
        if self.teacher_space is None:
            return gradients.to(dtype)
        return self.teacher_space.view(-1).view(dtype)[: gradients.numel()].view_as(gradients).copy_(gradients)

    def _flush(self) -> None:
        """The products of all gradients that wait."""
        if not self.waiting:
            return
        owners, self.waiting = torch.cat(self.waiting), []
        wanted, where = self.gradients, self.rows.index[owners]
        with span(HEAD_GRADIENTS):
            gradient = self._gradients_to_multiply(len(owners))
            if wanted.hidden is not None:
                own = self.head.back(gradient, self.dtype)
                self.largest.gradient[owners] = torch.linalg.vector_norm(own, torch.inf, dim=-1)
                wanted.hidden[where] = own
            if wanted.weight is not None:
                add_product(
                    wanted.weight, gradient.T, self.hidden[where].to(gradient.dtype), self.head.scale, wanted.weight_is_empty
                )
                wanted.weight_is_empty = False
            if wanted.bias is not None:
                wanted.bias += self.head.scale * self.student_space[: len(owners)].sum(0)


def _diagnosed(keys: TokenKeys) -> Tensor:
    """[n] bool: one token in thirty-two of a sequence, from a start that differs between sequences."""
    return (7 * keys.sample + keys.position) % DIAGNOSED == 0


class _Precomputed(torch.autograd.Function):
    """A scalar whose gradients are known: the backward pass scales them in place and rounds them once to the inputs' dtypes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients, ctx.dtypes = gradients, [source.dtype for source in inputs]
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the loss was differentiated before, which used up its gradients: compute it again")
        gradients, ctx.gradients = ctx.gradients, None  # the caller's alone now, so that nobody copies them
        if float(outer[0]) != 1:
            for gradient in gradients:
                gradient.mul_(outer[0].to(gradient.dtype))
        return None, None, *(gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True))
