"""Several teachers, mixed or one for each sample. Each answers with its whole vocabulary, chunk by chunk."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.errors import CapabilityError, VocabularyError
from speckd.teachers.source import PendingAnswer, Question, TeacherSource
from speckd.tokens import SupervisedRows, TokenBatch
from speckd.types import Capabilities, DenseSignal, DenseTeacherRows, TeacherRows

#: What is held beside the engine's own space: a second teacher's logits of some rows, or columns on their way to other rows.
_ROOM_BYTES = 32 * 2**20
_FEWEST_ROWS = 16  # that are multiplied with a head at once
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")

# ---- mixed -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MixedTeacher:
    """log Σ wᵢ pᵢ over the whole vocabulary, as logits. `weights`: of the teachers, positive, adding up to 1."""

    teachers: tuple[DenseTeacherRows, ...]
    weights: tuple[float, ...]

    @property
    def dtype(self) -> torch.dtype:
        return _widest(self.teachers)

    @property
    def vocabulary_size(self) -> int:
        return self.teachers[0].vocabulary_size

    def write_logits(self, index: Tensor, out: Tensor) -> None:
        step = max(_FEWEST_ROWS, _ROOM_BYTES // (out.element_size() * out.shape[1]))
        room = torch.empty_like(out[:step])
        for start in range(0, len(index), step):
            some = slice(start, min(len(index), start + step))
            self._mix(index[some], out[some], room[: some.stop - start])

    def _mix(self, index: Tensor, out: Tensor, room: Tensor) -> None:
        for number, (teacher, weight) in enumerate(zip(self.teachers, self.weights, strict=True)):
            own = room if number else out
            teacher.write_logits(index, own)
            known = DenseSignal(own)
            own.sub_(known.maximum + known.log_mass - math.log(weight))
            if number:
                torch.logaddexp(out, own, out=out)

    def logits_at(self, index: Tensor, token_ids: Tensor) -> Tensor:
        """As costly as all of them: a mixture is known only where every teacher's whole distribution is."""
        return self.signal(index).logits.gather(-1, token_ids)

    def signal(self, index: Tensor) -> DenseSignal:
        return _written(self, index)


class MixedSource:
    """Asks all teachers about every token.

    Args:
        sources: on one axis, each with the whole vocabulary.
        weights: one for each, positive; only their ratios matter.

    Raises:
        CapabilityError, VocabularyError: the teachers cannot be mixed.
    """

    capabilities = Capabilities()

    def __init__(self, sources: Sequence[TeacherSource], weights: Sequence[float]) -> None:
        self.vocabulary = _one_axis(sources)
        self._sources, self._weights = tuple(sources), tuple(weight / sum(weights) for weight in weights)

    def expect(self, question: Question) -> None:
        for source in self._sources:
            source.expect(question)

    def settle(self, questions: Sequence[Question]) -> None:
        for source in self._sources:
            source.settle(questions)

    def launch(self, question: Question) -> "LaunchedMixture":
        return LaunchedMixture(tuple(source.launch(question) for source in self._sources), self._weights)

    def close(self) -> None:
        for source in self._sources:
            source.close()


@dataclass(frozen=True)
class LaunchedMixture:
    """Answers of all teachers, on their way."""

    answers: tuple[PendingAnswer, ...]
    weights: tuple[float, ...]

    def rows(self) -> MixedTeacher:
        return MixedTeacher(tuple(_dense(answer.rows()) for answer in self.answers), self.weights)


# ---- routed ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RoutedTeacher:
    """Each row from the teacher of its sample.

    `teachers`: those that were asked, by number; `which`: [B·L], whose each flattened position is; `place`: [B·L], where that
    is among the positions that this teacher was asked about; `size`: of the vocabulary.
    """

    teachers: dict[int, DenseTeacherRows]
    which: Tensor
    place: Tensor
    size: int

    @property
    def dtype(self) -> torch.dtype:
        return _widest(self.teachers.values())

    @property
    def vocabulary_size(self) -> int:
        return self.size

    def write_logits(self, index: Tensor, out: Tensor) -> None:
        """Teacher by teacher, one behind the other, so that products are large; then the rows go to their places, in place."""
        order = self.which[index].argsort(stable=True)
        for number, some in self._parts(index[order]):
            self.teachers[number].write_logits(self.place[index[order[some]]], out[some])
        if bool((order[1:] > order[:-1]).all()):
            return
        back = order.argsort()
        for columns in out.split(max(256, _ROOM_BYTES // (out.element_size() * len(out))), dim=1):
            columns.copy_(columns[back])

    def logits_at(self, index: Tensor, token_ids: Tensor) -> Tensor:
        found = torch.empty(token_ids.shape, dtype=self.dtype, device=index.device)
        order = self.which[index].argsort(stable=True)
        for number, some in self._parts(index[order]):
            own = order[some]
            found[own] = self.teachers[number].logits_at(self.place[index[own]], token_ids[own]).to(found.dtype)
        return found

    def signal(self, index: Tensor) -> DenseSignal:
        return _written(self, index)

    def _parts(self, index: Tensor) -> list[tuple[int, slice]]:
        """Teachers and their rows, where positions are grouped by teacher."""
        numbers, counts = self.which[index].unique_consecutive(return_counts=True)
        ends = counts.cumsum(0)
        starts = (ends - counts).tolist()
        return [(n, slice(a, b)) for n, a, b in zip(numbers.tolist(), starts, ends.tolist(), strict=True)]


class RoutedSource:
    """Asks each teacher about the samples that are its own (`Question.teachers`), and computes no other rows.

    Args:
        sources: by number, on one axis, each with the whole vocabulary.

    Raises:
        CapabilityError, VocabularyError: the teachers cannot stand side by side.
    """

    capabilities = Capabilities()

    def __init__(self, sources: Sequence[TeacherSource]) -> None:
        self.vocabulary, self._sources = _one_axis(sources), tuple(sources)

    def expect(self, question: Question) -> None:
        for number, part in _parts(question):
            self._sources[number].expect(part.question)

    def settle(self, questions: Sequence[Question]) -> None:
        for question in questions:
            for number, part in _parts(question):
                self._sources[number].settle([part.question])

    def launch(self, question: Question) -> "LaunchedRoutes":
        launched = {number: (self._sources[number].launch(part.question), part.place) for number, part in _parts(question)}
        assert question.teachers is not None
        return LaunchedRoutes(launched, question.teachers.flatten(), self.vocabulary.size)

    def close(self) -> None:
        for source in self._sources:
            source.close()


@dataclass(frozen=True)
class LaunchedRoutes:
    """Answers of the teachers that were asked, each with the places of its positions, on their way."""

    answers: dict[int, tuple[PendingAnswer, Tensor]]
    which: Tensor
    size: int

    def rows(self) -> RoutedTeacher:
        place = torch.full_like(self.which, -1)
        for number, (_, own) in self.answers.items():
            place = torch.where(self.which == number, own, place)
        teachers = {number: _dense(answer.rows()) for number, (answer, _) in self.answers.items()}
        return RoutedTeacher(teachers, self.which, place, self.size)


@dataclass(frozen=True)
class _Part:
    """One teacher's share of a batch. `place`: [B·L], each flattened position's number in it, −1 where it was left out."""

    question: Question
    place: Tensor


def _parts(question: Question) -> list[tuple[int, _Part]]:
    """Only of teachers with something to say: a sample of theirs has a supervised token."""
    if question.teachers is None:
        raise CapabilityError("samples do not say which teacher is theirs", "Name the column that does: teacher_route_column")
    whose = question.teachers.flatten()[question.rows.index]
    return [(number, _part(question, number, (whose == number).nonzero()[:, 0])) for number in whose.unique().tolist()]


def _part(question: Question, number: int, rows: Tensor) -> _Part:
    """Of a padded batch the lines with some of these supervised rows; of the one packed line this teacher's own samples."""
    assert question.teachers is not None
    whose, index = question.teachers, question.rows.index[rows]
    flat = "position_ids" in question.inputs and len(whose) == 1
    kept = whose[0] == number if flat else (index // whose.shape[1]).unique()

    def own(tensor: Tensor) -> Tensor:
        return tensor[:, kept] if flat else tensor[kept]

    numbers = torch.arange(whose.numel(), device=index.device)
    left = own(numbers.view_as(whose)).flatten()
    place = torch.full_like(numbers, -1).index_copy_(0, left, numbers[: len(left)])
    some = SupervisedRows(place[index], question.rows.labels[rows], question.rows.keys.rows(rows))
    tokens = question.tokens
    tokens = TokenBatch(own(tokens.input_ids), own(tokens.labels), own(tokens.sample_ids), own(tokens.position_ids))
    lines = {name: own(tensor) for name, tensor in question.inputs.items() if name not in _BORDERS}
    borders = {name: value for name, value in _borders(tokens).items() if name in question.inputs}
    return _Part(Question(lines | borders, tokens, some), place)


def _borders(tokens: TokenBatch) -> dict[str, Any]:
    """Where the samples in a packed line begin and end, as attention kernels want it; by the names of TRL's collator."""
    starts = (tokens.position_ids[0] == 0).nonzero()[:, 0]
    ends = torch.cat([starts, starts.new_tensor([tokens.position_ids.shape[1]])]).int()
    longest, index = int(ends.diff().max()), torch.arange(len(starts), dtype=torch.int32, device=ends.device)
    return dict(zip(_BORDERS, (ends, ends, longest, longest, index.repeat_interleave(ends.diff())[None]), strict=True))


# ---- both ------------------------------------------------------------------------------------------------------------------


def _one_axis(sources: Sequence[TeacherSource]) -> SharedVocabulary:
    if any(source.capabilities.top_k is not None for source in sources):
        raise CapabilityError(
            "several teachers: one of them gives its top-K only, but each must give its whole vocabulary", "Use models"
        )
    first = sources[0].vocabulary
    if not all(first.same_axis(source.vocabulary) for source in sources):
        raise VocabularyError(
            "several teachers: they do not share the same tokens with the student",
            "Give them one axis (compatibility.common_axis)",
        )
    return first


def _dense(rows: TeacherRows) -> DenseTeacherRows:
    if not isinstance(rows, DenseTeacherRows):
        raise CapabilityError("several teachers: one of them cannot write its whole vocabulary", "Use models")
    return rows


def _widest(teachers: Iterable[DenseTeacherRows]) -> torch.dtype:
    return reduce(torch.promote_types, (teacher.dtype for teacher in teachers), torch.float32)


def _written(teacher: DenseTeacherRows, index: Tensor) -> DenseSignal:
    logits = torch.empty(len(index), teacher.vocabulary_size, dtype=teacher.dtype, device=index.device)
    teacher.write_logits(index, logits)
    return DenseSignal(logits)
