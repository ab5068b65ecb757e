"""Some sequences as a run's models see them, outside training: one forward of each, then chunk by chunk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from speckd.collation import Wanted, question_about
from speckd.compatibility import SharedVocabulary
from speckd.engine import default_chunk_size
from speckd.head import LMHead
from speckd.sources.rewinding import in_eval_mode
from speckd.teachers.model import ModelSource
from speckd.teachers.source import TeacherSource
from speckd.tokens import SupervisedRows
from speckd.trainer import SpecKDTrainer
from speckd.types import DenseSignal, TeacherRows, TeacherSignal


@dataclass(frozen=True)
class Chunk:
    """Some of the supervised rows. `rows`: who they are; the signals are theirs, `teacher` and `reference` None where nobody is
    asked."""

    rows: SupervisedRows
    student: DenseSignal
    teacher: TeacherSignal | None
    reference: TeacherSignal | None


@dataclass(frozen=True)
class Looked:
    """What was asked and answered, before any logits.

    `rows`: N supervised tokens, under the keys that they have in training; `hidden`: [B·L, H] of the student; `head`: on the
    axis of `vocabulary`; `answers`, `reference`: of the teacher and of a third model, None where nobody was asked.
    """

    vocabulary: SharedVocabulary
    rows: SupervisedRows
    hidden: Tensor
    head: LMHead
    answers: TeacherRows | None
    reference: TeacherRows | None

    def chunks(self) -> Iterator[Chunk]:
        """In order; no more logits at once than the loss would hold."""
        for index in torch.arange(len(self.rows), device=self.hidden.device).split(
            default_chunk_size(self.head.weight.shape[0])
        ):
            part = self.rows.rows(index)
            student = DenseSignal(self.head(self.hidden[part.index]))
            teacher = None if self.answers is None else self.answers.signal(part.index)
            reference = None if self.reference is None else self.reference.signal(part.index)
            yield Chunk(part, student, teacher, reference)

    def token_ids(self, places: Tensor) -> Tensor:
        """Indices of the shared axis, any shape, as token ids, on the CPU."""
        places = places.cpu()
        return places if self.vocabulary.ids is None else self.vocabulary.ids.cpu()[places]


@torch.no_grad()
def look(trainer: SpecKDTrainer, asked: Sequence[Wanted], source: TeacherSource | None) -> Looked:
    """Asks student, teacher and reference model about some sequences, with the gate's draws of epoch 0.

    Leaves no trace: modes come back as they were, nothing random is drawn, and what the log says of the teacher's work does not
    count it.
    """
    vocabulary = trainer.vocabulary if source is None else source.vocabulary
    question = question_about(asked, vocabulary, trainer.accelerator.device)
    rows = _as_in_the_run(question.rows, asked, trainer.args.effective_gate_seed)
    counted = source.positions.clone() if isinstance(source, ModelSource) else None
    with in_eval_mode(trainer.model), trainer.accelerator.autocast():
        pending = None if source is None else source.launch(question)
        hidden = trainer.student.get_decoder()(**question.inputs, use_cache=False).last_hidden_state.flatten(0, 1)
        head = vocabulary.restrict(LMHead.from_model(trainer.student))
        answers = None if pending is None else pending.rows()
        third = None if trainer.reference is None else trainer.reference.launch(question).rows()
    if isinstance(source, ModelSource) and counted is not None:
        source.positions = counted
    return Looked(vocabulary, rows, hidden, head, answers, third)


def _as_in_the_run(rows: SupervisedRows, asked: Sequence[Wanted], seed: int) -> SupervisedRows:
    """The same rows under the keys that they have in training, where samples are numbered through the data."""
    numbers = torch.tensor([one.row - 1 for one in asked], device=rows.index.device)
    return replace(rows, keys=replace(rows.keys, sample=numbers[rows.keys.sample], seed=seed))
