"""A teacher behind servers: asked ahead of need, waited for between two steps."""

from collections.abc import Sequence as Many
from concurrent.futures import Future
from dataclasses import dataclass

from speckd.compatibility import SharedVocabulary
from speckd.spans import TEACHER_FORWARD, span
from speckd.teachers.answers import Answer, rows_of
from speckd.teachers.client import ServerPool
from speckd.teachers.source import Question
from speckd.tokens import Sequence, sequences
from speckd.types import Capabilities, TeacherRows

_Key = tuple[bytes, bytes]


class ServedSource:
    """Answers by what the servers say of each sequence.

    Args:
        pool: probed before the first question.
        vocabulary: what the student shares with the served teacher.
        top_k: tokens that each answer has; None: the whole vocabulary.
    """

    def __init__(self, pool: ServerPool, vocabulary: SharedVocabulary, top_k: int | None) -> None:
        self.pool, self.vocabulary = pool, vocabulary
        self.capabilities = Capabilities(None if top_k is None or top_k >= vocabulary.size else top_k)
        self._asked: dict[_Key, Future[Answer]] = {}  # and not yet used

    def expect(self, question: Question) -> None:
        for one in sequences(question.tokens, question.rows):
            self._ask(one)

    def settle(self, questions: Many[Question]) -> None:
        """Waits until these can be answered.

        Raises:
            TeacherLostError: they cannot.
        """
        with span(TEACHER_FORWARD):
            self.pool.gather([self._ask(one) for each in questions for one in sequences(each.tokens, each.rows)])

    def launch(self, question: Question) -> "ServedAnswer":
        asked = list(sequences(question.tokens, question.rows))
        futures = [self._ask(one) for one in asked]
        for one in asked:
            self._asked.pop(_key(one), None)
        return ServedAnswer(self.pool, asked, futures, question)

    def close(self) -> None:
        self.pool.close()

    def _ask(self, one: Sequence) -> "Future[Answer]":
        key = _key(one)
        if key not in self._asked:
            self._asked[key] = self.pool.ask(one.token_ids, one.positions)
        return self._asked[key]


def _key(one: Sequence) -> _Key:
    return one.token_ids.numpy().tobytes(), one.positions.numpy().tobytes()


@dataclass(frozen=True)
class ServedAnswer:
    """Questions that may still be under way."""

    pool: ServerPool
    asked: Many[Sequence]
    futures: "Many[Future[Answer]]"
    question: Question

    def rows(self) -> TeacherRows:
        answers = self.pool.gather(self.futures)
        return rows_of(self.asked, answers, self.question.rows.index, self.question.tokens.input_ids.numel())
