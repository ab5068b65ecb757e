"""Two models that write texts together, token after token: what is common to every rule by which they do."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.errors import ConfigError, DataError, VocabularyError
from speckd.head import LMHead
from speckd.sources.rewinding import RewindingReader, check_rewinding, in_eval_mode, input_device
from speckd.sources.sampling import uniform_pairs_at
from speckd.sources.writer import Completion, Draws, Prompt
from speckd.teachers.in_process import HiddenTeacher
from speckd.teachers.placement import head_on
from speckd.types import DenseSignal

_NOTHING = Completion(torch.zeros(0, dtype=torch.long), finished=False, replaced=torch.zeros(0, dtype=torch.bool))

Context: TypeAlias = Callable[[], AbstractContextManager[Any]]


class TwoModels:
    """A student and a teacher, and what they may write.

    `ids`: the shared tokens' ids in the order of the shared axis; `stops`: which of that axis end a text.

    Args:
        student, teacher, vocabulary, stop_token_ids, batch_size, student_context, teacher_context: as of `InterleavedWriter`.

    Raises:
        ConfigError: batch_size out of range.
        VocabularyError: stop tokens are given, and none of them is shared.
        CapabilityError: a model's cache cannot be rewound.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        vocabulary: SharedVocabulary,
        stop_token_ids: Sequence[int],
        batch_size: int,
        student_context: Context,
        teacher_context: Context,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}", "Use 1 or more")
        self.vocabulary, self.batch_size = vocabulary, batch_size
        self.ids = torch.arange(vocabulary.size) if vocabulary.ids is None else vocabulary.ids
        self.stops = _shared_stops(self.ids, stop_token_ids)
        device = input_device(student, torch.device("cpu"))
        self._student = _Speaker(student, vocabulary, device, student_context)
        self._teacher = _Speaker(teacher, vocabulary, input_device(teacher, device), teacher_context)
        for speaker, name in ((self._student, "student"), (self._teacher, "teacher")):
            speaker.check(name)

    def write(
        self, prompts: Sequence[Prompt], most: int, finish: Callable[["Texts", "Begun", "Begun"], None]
    ) -> list[Completion]:
        """One completion a prompt, in order.

        Args:
            most: tokens of a completion; it also ends at the last position that both models have.
            finish: carries some texts on until none is open, by the student's and the teacher's reading, in that order. Both
                have read all but the last token of each.

        Raises:
            DataError: a prompt is empty.
            VocabularyError: a prompt holds a token that the two do not share.
        """
        self._refuse(prompts)
        positions = min(self._student.positions, self._teacher.positions)
        limits = [min(most, positions - len(prompt.token_ids)) for prompt in prompts]
        found = {number: _NOTHING for number, limit in enumerate(limits) if limit < 1}
        order = [number for number, limit in enumerate(limits) if limit >= 1]
        order.sort(key=lambda number: len(prompts[number].token_ids))  # little padding
        with in_eval_mode(self._student.model), in_eval_mode(self._teacher.model):
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                texts = Texts([prompts[number] for number in some], [limits[number] for number in some])
                finish(texts, *(one.begin(texts.unfinished(), texts.longest) for one in (self._student, self._teacher)))
                found.update(zip(some, texts.completions(), strict=True))
        return [found[number] for number in range(len(prompts))]

    def _refuse(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            if not len(prompt.token_ids):
                raise DataError(
                    f"the prompt of sample {prompt.sample} is empty", "Give it a token, such as the one that begins a text"
                )
            unknown = self.vocabulary.unknown(prompt.token_ids)
            if unknown.numel():
                raise VocabularyError(
                    f"the prompt of sample {prompt.sample} holds token id {int(unknown[0])}, which the two models do not share",
                    "Remove that token from the data or the chat template, or use a teacher that has it",
                )


def _shared_stops(ids: Tensor, stop_token_ids: Sequence[int]) -> Tensor:
    """As indices of the shared axis."""
    shared = torch.isin(ids, torch.tensor(list(stop_token_ids), dtype=torch.long)).nonzero()[:, 0]
    if stop_token_ids and not len(shared):
        raise VocabularyError(
            f"student and teacher share none of the stop tokens {sorted(stop_token_ids)}, so no text would end",
            "Use a teacher of the same family, or name a stop token that both have",
        )
    return shared


class Texts:
    """What N texts have so far, and which are still open. Everything on the CPU.

    `open`: [B] numbers of the texts that go on; `last`: [B], their last tokens; `longest`: tokens of the longest one, when all
    have reached their `limits`, [N] tokens after the prompt.
    """

    def __init__(self, prompts: Sequence[Prompt], limits: Sequence[int]) -> None:
        self._prompts, self._limit = prompts, torch.tensor(limits)
        self._start = torch.tensor([len(one.token_ids) for one in prompts])
        self._samples = torch.tensor([one.sample for one in prompts])
        shape = (len(prompts), max(limits))
        self._tokens, self._replaced = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
        self._count, self._finished = torch.zeros(shape[0], dtype=torch.long), torch.zeros(shape[0], dtype=torch.bool)
        self.open, self.last = torch.arange(shape[0]), torch.tensor([int(one.token_ids[-1]) for one in prompts])
        self.longest = int((self._start + self._limit).max())

    def unfinished(self) -> list[Tensor]:
        """The prompts but for their last tokens."""
        return [one.token_ids[:-1] for one in self._prompts]

    @property
    def samples(self) -> Tensor:
        """[B] int64: whose the open ones are."""
        return self._samples[self.open]

    def count(self, numbers: Tensor) -> Tensor:
        """[n] numbers of texts -> [n] tokens that they have, without the prompt."""
        return self._count[numbers]

    @property
    def most_left(self) -> int:
        """Tokens until the last open text reaches its limit."""
        return int((self._limit - self._count)[self.open].max())

    def chances(self, draws: Draws, steps: int) -> Tensor:
        """[B, steps, 2] uniforms of the next positions: for the proposal, for the replacement."""
        position = (self._start + self._count)[self.open][:, None] + torch.arange(steps)
        sample = self._samples[self.open][:, None].expand_as(position)
        return uniform_pairs_at(draws, sample.flatten(), position.flatten()).unflatten(0, position.shape)

    def take(self, offered: Tensor, accepted: Tensor, stops: Tensor) -> tuple[Tensor, Tensor]:
        """Appends [B, n] tokens up to the replaced one, a stop token or the limit, whichever is first.

        Args:
            accepted: [B], where the replaced token stands; n where none does.
            stops: [B, n] bool, which tokens end a text.

        Returns:
            which of the rows go on, [B'], and how many tokens each of them took.
        """
        column, count = torch.arange(offered.shape[1]), self._count[self.open]
        left = self._limit[self.open] - count
        before_stop = (stops.long().cumsum(-1) - stops.long() == 0).sum(-1)  # up to and with the first one
        kept = torch.stack([accepted + 1, before_stop, left]).amin(0).clamp(max=len(column))
        row, place = (column < kept[:, None]).nonzero(as_tuple=True)
        where = (self.open[row], count[row] + place)
        self._tokens[where] = offered[row, place]
        self._replaced[where] = place == accepted[row]
        self._count[self.open] += kept
        rows = torch.arange(len(kept))
        finished = stops[rows, kept - 1]
        self._finished[self.open] = finished
        goes_on = (~finished & (kept < left)).nonzero()[:, 0]
        self.last, self.open = offered[goes_on, kept[goes_on] - 1], self.open[goes_on]
        return goes_on, kept[goes_on]

    def completions(self) -> list[Completion]:
        columns = zip(self._count.tolist(), self._finished.tolist(), self._tokens, self._replaced, strict=True)
        return [Completion(tokens[:n].clone(), done, replaced[:n].clone()) for n, done, tokens, replaced in columns]


class _Speaker:
    """A model as one of the two: where it stands, and what its forwards run in."""

    def __init__(self, model: Any, vocabulary: SharedVocabulary, device: torch.device, context: Context) -> None:
        self.model, self._vocabulary, self._device, self._context = model, vocabulary, device, context
        self.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31

    def check(self, name: str) -> None:
        with in_eval_mode(self.model), self._context():
            check_rewinding(self.model.get_decoder(), name, self._device)

    def begin(self, starts: Sequence[Tensor], longest: int) -> "Begun":
        with self._context():
            head = self._vocabulary.restrict(LMHead.from_model(self.model))
            reader = RewindingReader(self.model.get_decoder(), starts, longest, self._device)
        return Begun(reader, head, self._device, self._context)


class Begun:
    """A model in the middle of some texts."""

    def __init__(self, reader: RewindingReader, head: LMHead, device: torch.device, context: Context) -> None:
        self.reader, self.device, self._head, self._context = reader, device, head_on(head, device), context

    def read(self, tokens: Tensor) -> Tensor:
        with self._context():
            return self.reader.read(tokens)

    def signal(self, hidden: Tensor) -> DenseSignal:
        """[n, H] -> the distributions over the shared axis."""
        return HiddenTeacher(hidden, self._head).signal(torch.arange(len(hidden), device=hidden.device))
