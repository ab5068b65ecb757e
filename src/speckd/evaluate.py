"""Held-out measures of a student against its teacher, under one fixed rule, whatever the student was trained with."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.divergences import forward_kl
from speckd.engine import default_chunk_size
from speckd.gates import TopK
from speckd.head import LMHead
from speckd.objective import require_usable_logits, usable_logits
from speckd.support import shared_support
from speckd.teachers import HiddenTeacher
from speckd.tiles import row_slices, softmax
from speckd.tokens import SupervisedRows, TokenBatch, supervised_rows
from speckd.types import Capabilities, DenseSignal, Rows, TeacherRows

#: TAR on held-out data is always that of the paper's greedy gate, so that runs with different gates can be compared.
FIXED_RULE = TopK(verify_top_k=5)


@dataclass
class HeldOutSums:
    """Sums over supervised tokens, to be added over batches and processes; `sequences` and `tar_sum` over sequences."""

    tokens: float = 0.0
    sequences: float = 0.0
    nll: float = 0.0
    kl: float = 0.0
    agreement: float = 0.0
    alpha: float = 0.0
    accepted: float = 0.0
    tar_sum: float = 0.0
    teacher_nll: float = 0.0

    def tensor(self) -> Tensor:
        return torch.tensor([getattr(self, f.name) for f in fields(self)], dtype=torch.float64)

    @classmethod
    def of(cls, values: Tensor) -> "HeldOutSums":
        return cls(*values.tolist())

    def result(self, teacher: Capabilities | None) -> dict[str, float]:
        """Means: `nll`, `kl` (teacher ‖ student), `teacher_nll` in nats a token; `agreement` of the two argmaxes; `alpha`, the
        expected acceptance Σ min(p, q); `tar` (Top-5, macro) and `tar_micro`; `tokens`, over how many.

        Of a teacher that gives its top-K only, KL and α are `kl_at_least` and `alpha_at_least`: of the K tokens and one for all
        others, and of the K tokens. What cannot be known from it is left out.
        """
        if not self.tokens:
            return {"tokens": 0.0}
        found = {"nll": self.nll / self.tokens}
        if teacher is None:
            return found | {"tokens": self.tokens}
        name = "{}" if teacher.top_k is None else "{}_at_least"
        if teacher.ranked:
            found |= {
                name.format("kl"): self.kl / self.tokens,
                "agreement": self.agreement / self.tokens,
                name.format("alpha"): self.alpha / self.tokens,
            }
        if _fixed_rule_known(teacher):
            found |= {"tar": self.tar_sum / self.sequences, "tar_micro": self.accepted / self.tokens}
        return found | {"teacher_nll": self.teacher_nll / self.tokens, "tokens": self.tokens}


def _fixed_rule_known(teacher: Capabilities) -> bool:
    return teacher.top_k is None or (teacher.ranked and teacher.top_k >= FIXED_RULE.verify_top_k)


@dataclass(frozen=True)
class TokenMeasures:
    """Of n supervised tokens, each [n] float64: what `HeldOutSums` adds up, by its names, and what calibration asks for.

    `confidence`: the student's largest probability; `correct`: its argmax is the label; `brier`: Σ_v (q(v) − 1[v = label])².
    What was not asked, or the teacher cannot say, is None.
    """

    nll: Tensor
    teacher_nll: Tensor | None = None
    kl: Tensor | None = None
    agreement: Tensor | None = None
    alpha: Tensor | None = None
    accepted: Tensor | None = None
    confidence: Tensor | None = None
    correct: Tensor | None = None
    brier: Tensor | None = None


@torch.no_grad()
def token_measures(
    student_hidden: Tensor,
    student_head: LMHead,
    teacher: TeacherRows | None,
    rows: SupervisedRows,
    known: Capabilities = Capabilities(),  # noqa: B008  (frozen)
    calibration: bool = False,
) -> Iterator[tuple[Tensor, TokenMeasures]]:
    """Pairs of [n] places in `rows` and their measures: chunk by chunk, so no [tokens, vocabulary]. Arguments as of
    `engine.distillation_loss`; `known`: what the teacher can be asked."""
    for chunk in torch.arange(len(rows), device=student_hidden.device).split(default_chunk_size(student_head.weight.shape[0])):
        if not len(chunk):
            break
        logits = student_head(student_hidden[rows.index[chunk]])
        keys = rows.keys.rows(chunk)
        require_usable_logits(usable_logits(logits), "student", keys)
        labels = rows.labels[chunk]
        student = DenseSignal(logits)
        found = {"nll": -student.label_log_prob(labels)}
        if calibration:
            found |= _calibration(student, labels)
        if teacher is not None:
            seen = Rows.of(student, teacher.signal(rows.index[chunk]), labels, keys)
            found["teacher_nll"] = -seen.teacher.label_log_prob(labels)
            if known.ranked:
                own, reference = shared_support(logits, seen.teacher)
                require_usable_logits(usable_logits(reference), "teacher", keys)
                found["kl"] = forward_kl(own, reference)
                found["agreement"] = logits.argmax(-1) == seen.teacher.argmax()
                found["alpha"] = seen.teacher.overlap(seen.student)
            if _fixed_rule_known(known):
                found["accepted"] = FIXED_RULE(seen)
        yield chunk, TokenMeasures(**{name: values.double() for name, values in found.items()})


def _calibration(student: DenseSignal, labels: Tensor) -> dict[str, Tensor]:
    best = student.argmax()
    squares = torch.cat([softmax(student.logits[some]).square().sum(-1) for some in row_slices(student.logits)])
    return {
        "confidence": student.label_log_prob(best).exp(),
        "correct": best == labels,
        "brier": squares - 2 * student.label_log_prob(labels).exp() + 1,
    }


def measure(
    sums: HeldOutSums,
    student_hidden: Tensor,
    student_head: LMHead,
    teacher: TeacherRows | None,
    rows: SupervisedRows,
    known: Capabilities = Capabilities(),  # noqa: B008  (frozen)
) -> None:
    """Adds one batch. Arguments as of `token_measures`."""
    accepted = []
    for _, found in token_measures(student_hidden, student_head, teacher, rows, known):
        for name in ("nll", "teacher_nll", "kl", "agreement", "alpha"):
            values = getattr(found, name)
            if values is not None:
                setattr(sums, name, getattr(sums, name) + float(values.sum()))
        if found.accepted is not None:
            accepted.append(found.accepted)
    sums.tokens += len(rows)
    if accepted:
        verdicts = torch.cat(accepted)
        _, place, size = rows.keys.sample.unique(return_inverse=True, return_counts=True)
        sums.accepted += float(verdicts.sum())
        sums.tar_sum += float((verdicts / size[place]).sum())
        sums.sequences += len(size)


@torch.no_grad()
def evaluate(
    student: Any, teacher: Any | None, vocabulary: SharedVocabulary | None, batches: Iterable[tuple[TokenBatch, Tensor]]
) -> dict[str, float]:
    """The measures over some batches, without a trainer.

    Args:
        student, teacher: Transformers causal language models on one device; the teacher may be None.
        vocabulary: what they share; None where they have the same vocabulary throughout.
        batches: pairs of a batch and its attention mask, [B, L].
    """
    training = student.training
    student.eval()
    sums = HeldOutSums()
    for batch, mask in batches:
        size = student.get_output_embeddings().weight.shape[0]
        shared = vocabulary or SharedVocabulary(size)
        labels = shared.labels(batch.labels)
        rows = supervised_rows(TokenBatch(batch.input_ids, labels, batch.sample_ids, batch.position_ids))
        answers = None
        if teacher is not None:
            hidden = teacher.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
            answers = HiddenTeacher(hidden.flatten(0, 1), shared.restrict(LMHead.from_model(teacher)))
        hidden = student.get_decoder()(input_ids=batch.input_ids, attention_mask=mask, use_cache=False).last_hidden_state
        measure(sums, hidden.flatten(0, 1), shared.restrict(LMHead.from_model(student)), answers, rows)
    student.train(training)
    return sums.result(None if teacher is None else Capabilities())
