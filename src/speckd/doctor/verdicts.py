"""Some sequences as the run's gate sees them, and one of them as text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from speckd.collation import Wanted
from speckd.doctor.findings import JudgedToken, Sample
from speckd.looking import Chunk, look
from speckd.teachers.source import TeacherSource
from speckd.trainer import SpecKDTrainer
from speckd.types import BatchGate, Rows


@dataclass(frozen=True)
class Verdicts:
    """Of N supervised tokens, on the CPU; what needs a teacher is empty without one.

    `labels`, `proposals`, `favourites`: [N] token ids: the data's, the student's and the teacher's most probable; `student`,
    `teacher`: [N] log-probabilities of the data's token; `acceptance`: [N] in [0, 1].
    """

    labels: Tensor
    proposals: Tensor
    student: Tensor
    favourites: Tensor
    teacher: Tensor
    acceptance: Tensor


@torch.no_grad()
def verdicts(trainer: SpecKDTrainer, asked: Sequence[Wanted], source: TeacherSource | None) -> Verdicts:
    """What student and teacher say of some sequences, and the run's gate of both, with its draws of epoch 0."""
    looked = look(trainer, asked, source)
    seen = [_of_chunk(trainer, chunk) for chunk in looked.chunks()]
    columns = [torch.cat(parts) for parts in zip(*seen, strict=True)]
    gate = trainer.objective.gate
    if isinstance(gate, BatchGate) and len(columns[-1]):
        columns[-1] = gate.select(columns[-1], looked.rows.keys)
    labels, proposals, student, favourites, teacher_says, acceptance = (column.cpu() for column in columns)
    labels, proposals, favourites = (looked.token_ids(column) for column in (labels, proposals, favourites))
    return Verdicts(labels, proposals, student, favourites, teacher_says, acceptance)


def _of_chunk(trainer: SpecKDTrainer, chunk: Chunk) -> tuple[Tensor, ...]:
    labels, student, teacher = chunk.rows.labels, chunk.student, chunk.teacher
    nothing = student.logits[:0, 0]
    known = labels, student.argmax(), student.label_log_prob(labels)
    if teacher is None:
        return *known, labels[:0], nothing, nothing
    acceptance = nothing
    if trainer.objective.needs_teacher:
        gate, seen = trainer.objective.gate, Rows.of(student, teacher, labels, chunk.rows.keys, chunk.reference)
        acceptance = gate.score(seen) if isinstance(gate, BatchGate) else gate(seen)
    return *known, teacher.argmax(), teacher.label_log_prob(labels), acceptance


def sample(trainer: SpecKDTrainer, one: Wanted) -> Sample:
    """One sequence, decoded, with what is said of its supervised tokens."""
    found, tokenizer = verdicts(trainer, [one], trainer.source), trainer.processing_class
    judged = []
    for i, position in enumerate((one.positions + 1).tolist()):
        judged.append(
            JudgedToken(
                position=position,
                token=shown(tokenizer, int(found.labels[i])),
                proposal=shown(tokenizer, int(found.proposals[i])),
                student=float(found.student[i].exp()),
                acceptance=float(found.acceptance[i]) if len(found.acceptance) else None,
                favourite=shown(tokenizer, int(found.favourites[i])) if len(found.favourites) else None,
                teacher=float(found.teacher[i].exp()) if len(found.teacher) else None,
            )
        )
    return Sample(one.row, len(one.token_ids), tuple(_pieces(tokenizer, one)), tuple(judged))


def shown(tokenizer: Any, token_id: int) -> str:
    """A token as it would be written, on one line."""
    text = tokenizer.decode([token_id], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if not text.strip() or "\ufffd" in text:  # a blank, or a part of a letter
        text = str(tokenizer.convert_ids_to_tokens(token_id)) if not text or "\ufffd" in text else text
    return visible(text).replace("\n", "\\n")


def visible(text: str) -> str:
    """Without what a terminal would take as a command."""
    return "".join(letter if letter.isprintable() or letter == "\n" else repr(letter)[1:-1] for letter in text)


def _pieces(tokenizer: Any, one: Wanted) -> Iterator[tuple[str, bool]]:
    """Stretches of the sequence that are or are not supervised."""
    supervised = torch.zeros(len(one.token_ids), dtype=torch.bool)
    supervised[one.positions + 1] = True
    borders = [0, *((supervised[1:] != supervised[:-1]).nonzero()[:, 0] + 1).tolist(), len(supervised)]
    for start, end in pairwise(borders):
        ids = one.token_ids[start:end].tolist()
        text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        yield visible(text), bool(supervised[start])
