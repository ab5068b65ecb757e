"""A teacher behind servers: asked ahead of need, waited for between two steps."""

from collections.abc import Iterable
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
        self._ahead: dict[_Key, Future[Answer]] = {}  # expected, and not yet needed
        self._settled: dict[_Key, Future[Answer]] = {}  # of one step, whose micro-batches may hold equal rows

    def expect(self, question: Question) -> None:
        for one in sequences(question.tokens, question.rows):
            if (key := _key(one)) not in self._ahead:
                self._ahead[key] = self.pool.ask(one.token_ids, one.positions)

    def forget_expected(self) -> None:
        """Nothing that was expected until now is still to come."""
        self._ahead.clear()

    def settle(self, questions: Many[Question]) -> None:
        """Waits until these can be answered; their answers are held until the next ones are settled.

        Raises:
            TeacherLostError: they cannot.
        """
        with span(TEACHER_FORWARD):
            self._settled = self._asked(one for each in questions for one in sequences(each.tokens, each.rows))
            self.pool.gather(self._settled.values())

    def launch(self, question: Question) -> "ServedAnswer":
        asked = list(sequences(question.tokens, question.rows))
        found = self._asked(one for one in asked if _key(one) not in self._settled)
        futures = [(found if (key := _key(one)) in found else self._settled)[key] for one in asked]
        return ServedAnswer(self.pool, asked, futures, question)

    def close(self) -> None:
        self.pool.close()

    def _asked(self, needed: Iterable[Sequence]) -> "dict[_Key, Future[Answer]]":
        """Each sequence once, and only those that were not expected anew."""
        found: dict[_Key, Future[Answer]] = {}
        for one in needed:
            if (key := _key(one)) in self._ahead:
                found[key] = self._ahead.pop(key)
            elif key not in found:
                found[key] = self.pool.ask(one.token_ids, one.positions)
        return found


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
