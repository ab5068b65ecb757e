"""Some sequences as the run's gate sees them, and one of them as text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from speckd.collation import Wanted, question_about
from speckd.compatibility import SharedVocabulary
from speckd.doctor.findings import JudgedToken, Sample
from speckd.engine import default_chunk_size
from speckd.head import LMHead
from speckd.teachers.source import TeacherSource
from speckd.tokens import SupervisedRows
from speckd.trainer import SpecKDTrainer
from speckd.types import BatchGate, DenseSignal, Rows, TeacherSignal


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
    vocabulary = trainer.vocabulary if source is None else source.vocabulary
    question = question_about(asked, vocabulary, trainer.accelerator.device)
    rows = _as_in_the_run(question.rows, asked, trainer.args.effective_gate_seed)
    trainer.model.eval()
    with trainer.accelerator.autocast():
        pending = None if source is None else source.launch(question)
        hidden = trainer.student.get_decoder()(**question.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        head = vocabulary.restrict(LMHead.from_model(trainer.student))
        answers = None if pending is None else pending.rows()
        third = None if trainer.reference is None else trainer.reference.launch(question).rows()
        seen = []
        for chunk in torch.arange(len(rows), device=hidden.device).split(default_chunk_size(head.weight.shape[0])):
            logits = head(hidden[rows.index[chunk]])
            teacher = None if answers is None else answers.signal(rows.index[chunk])
            reference = None if third is None else third.signal(rows.index[chunk])
            seen.append(_of_chunk(trainer, logits, teacher, rows, chunk, reference))
    columns = [torch.cat(parts) for parts in zip(*seen, strict=True)]
    gate = trainer.objective.gate
    if isinstance(gate, BatchGate) and len(columns[-1]):
        columns[-1] = gate.select(columns[-1], rows.keys)
    labels, proposals, student, favourites, teacher_says, acceptance = (column.cpu() for column in columns)
    ids = (_token_ids(vocabulary, column) for column in (labels, proposals, favourites))
    labels, proposals, favourites = ids
    return Verdicts(labels, proposals, student, favourites, teacher_says, acceptance)


def _as_in_the_run(rows: SupervisedRows, asked: Sequence[Wanted], seed: int) -> SupervisedRows:
    """The same rows under the keys that they have in training, where samples are numbered through the data."""
    numbers = torch.tensor([one.row - 1 for one in asked], device=rows.index.device)
    return replace(rows, keys=replace(rows.keys, sample=numbers[rows.keys.sample], seed=seed))


def _of_chunk(
    trainer: SpecKDTrainer,
    logits: Tensor,
    teacher: TeacherSignal | None,
    rows: SupervisedRows,
    chunk: Tensor,
    reference: TeacherSignal | None,
) -> tuple[Tensor, ...]:
    labels, student = rows.labels[chunk], DenseSignal(logits)
    known = labels, student.argmax(), student.label_log_prob(labels)
    if teacher is None:
        return *known, labels[:0], logits[:0, 0], logits[:0, 0]
    acceptance = logits[:0, 0]
    if trainer.objective.needs_teacher:
        gate, seen = trainer.objective.gate, Rows.of(student, teacher, labels, rows.keys.rows(chunk), reference)
        acceptance = gate.score(seen) if isinstance(gate, BatchGate) else gate(seen)
    return *known, teacher.argmax(), teacher.label_log_prob(labels), acceptance


def _token_ids(vocabulary: SharedVocabulary, places: Tensor) -> Tensor:
    return places if vocabulary.ids is None else vocabulary.ids[places]


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
