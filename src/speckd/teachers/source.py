"""Where a teacher's answers come from: one small protocol. In process, cached and served are interchangeable."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.errors import CapabilityError
from speckd.objective import Objective
from speckd.support import shared_support
from speckd.tokens import SupervisedRows, TokenBatch
from speckd.types import BatchGate, Capabilities, DenseSignal, Rows, TeacherRows, TeacherSignal, TokenKeys, TopKSignal


@dataclass(frozen=True)
class Question:
    """One batch, as a teacher is asked about it.

    `inputs`: what a model's forward takes, by name: [B, L] tensors and, of a packed line, where its samples end; `tokens`: the
    same batch as sequences; `rows`: the positions that want an answer; `teachers`: [B, L] int64, the number of each token's own
    teacher where several share the samples.
    """

    inputs: Mapping[str, Any]
    tokens: TokenBatch
    rows: SupervisedRows
    teachers: Tensor | None = None


class PendingAnswer(Protocol):
    def rows(self) -> TeacherRows:
        """Waits for the answer. Indices are into the flattened batch, on the device of the question's rows."""
        ...


class TeacherSource(Protocol):
    """A teacher, wherever it lives."""

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def vocabulary(self) -> SharedVocabulary:
        """The axis of its answers, shared with the student."""
        ...

    def expect(self, question: Question) -> None:
        """Says that this will be asked soon: a source that has to fetch may begin. May be called, or not, and never waits."""
        ...

    def settle(self, questions: Sequence[Question]) -> None:
        """Waits until these can be answered, before a step begins: a teacher is lost between two steps or not at all.

        Raises:
            TeacherLostError: they cannot.
        """
        ...

    def launch(self, question: Question) -> PendingAnswer:
        """Begins to answer, without waiting where the teacher is elsewhere."""
        ...

    def close(self) -> None: ...


def require_answers(objective: Objective, capabilities: Capabilities, vocabulary_size: int) -> None:
    """Asks of an example what gate and divergence will ask of every row, so that what cannot be answered is refused at once.

    Raises:
        CapabilityError: as the signal itself says it.
    """
    if not objective.needs_teacher:
        return
    size = max(vocabulary_size, 2)
    logits = torch.linspace(0, 1, size).expand(2, size).clone()
    signal = _example(capabilities, logits)
    zeros = torch.zeros(2, dtype=torch.int64)
    reference = DenseSignal(logits) if objective.needs_reference else None
    rows = Rows(logits, signal, zeros, TokenKeys(zeros, zeros), reference)
    gate = objective.gate
    gate.score(rows) if isinstance(gate, BatchGate) else gate(rows)
    shared_support(logits, signal, objective.divergence_temperature)
    objective.require_support(signal, size)


def _example(capabilities: Capabilities, logits: Tensor) -> TeacherSignal:
    if capabilities.top_k is None:
        return DenseSignal(logits) if capabilities.exact_top_k is None else _Rounded(logits, capabilities.exact_top_k)
    log_probs, ids = torch.log_softmax(logits, -1).topk(min(capabilities.top_k, logits.shape[-1]))
    return TopKSignal(ids, log_probs, log_probs[:, 0], capabilities.ranked)


@dataclass(frozen=True)
class _Rounded(DenseSignal):
    """A whole vocabulary of which only the first `exact_top_k` ranks are the teacher's own."""

    exact_top_k: int

    def in_top_k(self, token_ids: Tensor, k: int) -> Tensor:
        if k > self.exact_top_k:
            raise CapabilityError(
                f"verify_top_k is {k}, but of this teacher's rounded log-probabilities only the top {self.exact_top_k} keep "
                "their exact order",
                "Lower verify_top_k, or capture the teacher with teacher_cache_bits: 32",
            )
        return super().in_top_k(token_ids, k)
