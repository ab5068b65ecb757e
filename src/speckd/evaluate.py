"""Held-out measures of a student against its teacher, under one fixed rule, whatever the student was trained with."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.divergences import forward_kl
from speckd.engine import default_chunk_size
from speckd.gates import TopK
from speckd.head import LMHead
from speckd.objective import require_usable_logits
from speckd.teachers import HiddenTeacher
from speckd.tokens import SupervisedRows, TokenBatch, supervised_rows
from speckd.types import Rows, TeacherRows

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

    def result(self, with_teacher: bool = True) -> dict[str, float]:
        """Means: `nll`, `kl` (teacher ‖ student), `teacher_nll` in nats a token; `agreement` of the two argmaxes; `alpha`, the
        expected acceptance Σ min(p, q); `tar` (Top-5, macro) and `tar_micro`; `tokens`, over how many."""
        if not self.tokens:
            return {"tokens": 0.0}
        found = {"nll": self.nll / self.tokens}
        if with_teacher:
            found |= {
                "kl": self.kl / self.tokens,
                "agreement": self.agreement / self.tokens,
                "alpha": self.alpha / self.tokens,
                "tar": self.tar_sum / self.sequences,
                "tar_micro": self.accepted / self.tokens,
                "teacher_nll": self.teacher_nll / self.tokens,
            }
        return found | {"tokens": self.tokens}


@torch.no_grad()
def measure(
    sums: HeldOutSums, student_hidden: Tensor, student_head: LMHead, teacher: TeacherRows | None, rows: SupervisedRows
) -> None:
    """Adds one batch. Arguments as of `engine.distillation_loss`; chunk by chunk, so no [tokens, vocabulary]."""
    accepted = []
    for chunk in torch.arange(len(rows), device=student_hidden.device).split(default_chunk_size(student_head.weight.shape[0])):
        if not len(chunk):
            break
        logits = student_head(student_hidden[rows.index[chunk]])
        keys = rows.keys.rows(chunk)
        require_usable_logits(logits, "student", keys)
        log_probs = torch.log_softmax(logits, -1)
        labels = rows.labels[chunk]
        sums.nll -= float(log_probs.gather(-1, labels[:, None]).double().sum())
        if teacher is None:
            continue
        seen = Rows(logits, teacher.signal(rows.index[chunk]), labels, keys)
        reference = torch.log_softmax(seen.teacher.logits, -1)  # type: ignore[union-attr]
        require_usable_logits(reference, "teacher", keys)
        sums.kl += float(forward_kl(log_probs, reference).double().sum())
        sums.agreement += float((logits.argmax(-1) == seen.teacher.argmax()).sum())
        sums.alpha += float(seen.teacher.overlap(seen.student).double().sum())
        sums.teacher_nll -= float(seen.teacher.label_log_prob(labels).double().sum())
        accepted.append(FIXED_RULE(seen).double())
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
    return sums.result(with_teacher=teacher is not None)
