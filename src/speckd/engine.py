"""The objective over a batch, chunk by chunk: hidden states and heads in, never [tokens, vocabulary].

Gradients are computed in the forward pass, so a chunk's logits are gone before the next chunk's are made; the backward pass
only hands them on. Supervised rows are compacted before any product.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from speckd.errors import NonFiniteError
from speckd.head import LMHead
from speckd.objective import (
    Objective,
    TokenTerms,
    label_terms,
    require_finite_gradients,
    require_finite_losses,
    require_usable_logits,
    token_terms,
)
from speckd.tokens import SupervisedRows
from speckd.types import BatchGate, DenseSignal, Rows, TeacherRows

DEFAULT_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class LossOutput:
    """Sum and count, to be divided once, by the global count; and what happened at each token, [N], for the metrics.

    `sum`: the batch's loss, differentiable; `count`: its denominator by the objective's normaliser, no gradient.
    """

    sum: Tensor
    count: Tensor
    rows: SupervisedRows
    terms: TokenTerms
    teacher_entropy: Tensor


def default_chunk_size(vocabulary_size: int) -> int:
    """Rows whose float32 logits fill 64 MiB: large enough for the products, small enough for the cache of a workstation."""
    return max(16, DEFAULT_CHUNK_BYTES // (4 * vocabulary_size))


def distillation_loss(
    objective: Objective,
    student_hidden: Tensor,
    student_head: LMHead,
    teacher: TeacherRows | None,
    rows: SupervisedRows,
    chunk_size: int | None = None,
) -> LossOutput:
    """The objective's (sum, count) over the supervised rows of a batch.

    Args:
        objective: what is minimised.
        student_hidden: [B·L, H], the student's last hidden states of the flattened batch, with gradient or without.
        student_head: the student's head on the shared vocabulary; frozen parameters get no gradient and cost none.
        teacher: answers for indices into the flattened batch; None only where the objective needs no teacher.
        rows: which of the B·L positions are supervised, by `tokens.supervised_rows`.
        chunk_size: rows at once; by default, what fits 64 MiB of logits. The result does not depend on it.

    Raises:
        NonFiniteError: NaN or infinite logits or losses; nothing has been accumulated then.
    """
    chunk_size = chunk_size or default_chunk_size(student_head.weight.shape[0])
    compact = student_hidden[rows.index]  # only supervised rows go through the head
    chunks = torch.arange(len(rows), device=compact.device).split(chunk_size) if len(rows) else ()
    batch = _Batch(objective, student_head, teacher, rows)
    verdicts = batch.verdicts(compact, chunks)
    total, parts = _sum_with_gradient(batch, compact, chunks, verdicts)
    nothing = compact.detach().new_zeros(0)
    terms, entropies = [terms for terms, _ in parts], [entropy for _, entropy in parts]
    joined = TokenTerms(**{f.name: torch.cat([getattr(t, f.name) for t in terms] or [nothing]) for f in fields(TokenTerms)})
    count = joined.weight.sum() if objective.normalizer == "weight" else total.detach().new_tensor(len(rows))
    return LossOutput(total, count, rows, joined, torch.cat(entropies or [nothing]))


@dataclass(frozen=True)
class _Batch:
    """What every chunk of one batch shares."""

    objective: Objective
    head: LMHead
    teacher: TeacherRows | None
    rows: SupervisedRows

    def chunk(self, logits: Tensor, index: Tensor) -> Rows:
        assert self.teacher is not None
        keys = self.rows.keys.rows(index)
        return Rows(logits, self.teacher.signal(self.rows.index[index]), self.rows.labels[index], keys)

    @torch.no_grad()
    def verdicts(self, hidden: Tensor, chunks: Sequence[Tensor]) -> Tensor | None:
        """The first pass of a `BatchGate`: scores of every chunk, then one decision; None where rows are judged one by one."""
        gate = self.objective.gate
        if self.teacher is None or not self.objective.needs_teacher or not isinstance(gate, BatchGate) or not chunks:
            return None
        head = self.head.widened()
        scores = [gate.score(self.chunk(head(hidden[index]), index)) for index in chunks]
        return gate.select(torch.cat(scores), self.rows.keys)

    def terms(self, logits: Tensor, index: Tensor, verdicts: Tensor | None) -> tuple[TokenTerms, Tensor]:
        """One chunk's terms, and the teacher's entropy at its rows (NaN without a teacher)."""
        keys = self.rows.keys.rows(index)
        require_usable_logits(logits.detach(), "student", keys)
        if self.teacher is None or not self.objective.needs_teacher:
            terms = label_terms(logits, self.rows.labels[index])
            entropy = terms.acceptance
        else:
            chunk = self.chunk(logits, index)
            with torch.no_grad():
                if isinstance(chunk.teacher, DenseSignal):
                    require_usable_logits(chunk.teacher.logits, "teacher", keys)
                acceptance = (
                    self._judge(replace(chunk, student_logits=logits.detach())) if verdicts is None else verdicts[index]
                )
                entropy = chunk.teacher.entropy()
            terms = token_terms(self.objective, chunk, acceptance)
        require_finite_losses(terms.loss.detach(), keys)
        return terms, entropy

    def _judge(self, chunk: Rows) -> Tensor:
        assert not isinstance(self.objective.gate, BatchGate)
        return self.objective.gate(chunk)


def _sum_with_gradient(
    batch: _Batch, hidden: Tensor, chunks: Sequence[Tensor], verdicts: Tensor | None
) -> tuple[Tensor, list[tuple[TokenTerms, Tensor]]]:
    """The summed loss, tied to hidden states and head by gradients computed here, and each chunk's terms and entropy."""
    head = replace(
        batch.head, weight=_leaf(batch.head.weight), bias=None if batch.head.bias is None else _leaf(batch.head.bias)
    )
    pieces = [_leaf(hidden, index) for index in chunks]
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    parts = []
    for index, piece in zip(chunks, pieces, strict=True):
        terms, entropy = batch.terms(head(piece), index, verdicts)
        loss = terms.loss.double().sum()
        if loss.requires_grad:
            loss.backward()
            require_finite_gradients(_gradient(piece), batch.rows.keys.rows(index))
        total += loss.detach()
        parts.append((replace(terms, loss=terms.loss.detach()), entropy))
    total = total.to(_at_least_float32(hidden))
    if not bool(torch.isfinite(total)):
        raise NonFiniteError("the summed loss exceeds float32", "Lower the learning rate: the logits have grown out of bounds")
    if not torch.is_grad_enabled():
        return total, parts
    gathered: list[tuple[Tensor | None, Tensor]] = [
        (hidden, torch.cat([_gradient(piece) for piece in pieces] or [torch.zeros_like(hidden)]))
    ]
    gathered += [(batch.head.weight, _gradient(head.weight))] if head.weight.requires_grad else []
    gathered += [(batch.head.bias, _gradient(head.bias))] if head.bias is not None and head.bias.requires_grad else []
    return _Precomputed.apply(total, [gradient for _, gradient in gathered], *[source for source, _ in gathered]), parts


def _leaf(tensor: Tensor, index: Tensor | None = None) -> Tensor:
    """A detached (part of a) tensor that gathers its own gradient, in at least float32: bfloat16 sums would be biased."""
    leaf = (tensor if index is None else tensor[index]).detach().to(_at_least_float32(tensor))
    return leaf.requires_grad_(tensor.requires_grad and torch.is_grad_enabled())


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class _Precomputed(torch.autograd.Function):
    """A scalar whose gradients are already known: the backward pass scales them, and rounds them once to the inputs' dtypes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [source.dtype for source in inputs]
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> Any:
        return None, None, *((g * outer[0].to(g.dtype)).to(d) for g, d in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
