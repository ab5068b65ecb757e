"""A teacher whose answers were captured before: read from a folder, the teacher itself need not be there."""

from collections.abc import Sequence
from dataclasses import dataclass

from speckd.compatibility import SharedVocabulary
from speckd.spans import TEACHER_FORWARD, span
from speckd.teachers.answers import rows_of
from speckd.teachers.source import Question
from speckd.teachers.store import Store
from speckd.tokens import sequences
from speckd.types import Capabilities, TeacherRows


@dataclass(frozen=True)
class CachedSource:
    """Answers by what the store holds for exactly these tokens, whatever their order, epoch or batch."""

    store: Store
    vocabulary: SharedVocabulary

    @property
    def capabilities(self) -> Capabilities:
        return self.store.layout.capabilities

    def expect(self, question: Question) -> None:
        """The operating system reads ahead by itself."""

    def settle(self, questions: Sequence[Question]) -> None:
        """It is here."""

    def launch(self, question: Question) -> "ReadAnswer":
        """Reads at once.

        Raises:
            StoreError: a sequence or a position is not there, or is damaged.
        """
        with span(TEACHER_FORWARD):
            asked = list(sequences(question.tokens, question.rows))
            ids = [self.vocabulary.labels(one.token_ids) for one in asked]
            answers = [self.store.answer(own, one.positions) for own, one in zip(ids, asked, strict=True)]
            return ReadAnswer(rows_of(asked, answers, question.rows.index, question.tokens.input_ids.numel()))

    def close(self) -> None:
        """Nothing is held open."""


@dataclass(frozen=True)
class ReadAnswer:
    answer: TeacherRows

    def rows(self) -> TeacherRows:
        return self.answer
