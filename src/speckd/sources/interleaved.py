"""Interleaved sampling, as in SKD: the student proposes, the teacher replaces what it would hardly say."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from speckd.compatibility import SharedVocabulary
from speckd.errors import ConfigError, DataError, VocabularyError
from speckd.head import LMHead
from speckd.sources.model_writer import ROWS_AT_ONCE
from speckd.sources.rewinding import RewindingReader, check_rewinding, in_eval_mode, input_device
from speckd.sources.sampling import draw, uniform_pairs_at
from speckd.sources.writer import Completion, Draws, Prompt, Sampling
from speckd.teachers.in_process import HiddenTeacher
from speckd.teachers.placement import head_on
from speckd.types import DenseSignal

_LOGITS_BYTES = 2**28  # of the teacher's logits that are held at once
_NOTHING = Completion(torch.zeros(0, dtype=torch.long), finished=False, replaced=torch.zeros(0, dtype=torch.bool))

_Context = Callable[[], AbstractContextManager[Any]]


class InterleavedWriter:
    """Continues prompts by Speculative Knowledge Distillation's rule (Xu et al., arXiv 2410.11325, Algorithm 1):

        yᵢ ~ M_s(· | y₍<ᵢ₎, x)                        the student proposes
        if yᵢ ∉ top_K(M_t(· | y₍<ᵢ₎, x)):             the teacher verifies
            yᵢ ~ M_t(· | y₍<ᵢ₎, x)                    and puts a token of its own in that place

    So each token is distributed as `P(v) = q(v)·1[v ∈ top_K(p)] + p(v)·Σ_{u ∉ top_K(p)} q(u)`, with q the student and p the
    teacher as they sample. A replacement is drawn from all of p, not from its top-K, and may be the proposal again, marked as
    replaced all the same. Ranks are those of the teacher's logits, which no temperature moves and no truncation cuts; of
    tokens that tie at the border of the top-K, all are in it. `verify_top_k` = V never rejects: pure student sampling, the
    paper's on-policy end. 0 rejects everything: pure teacher sampling, its supervised end.

    Read of the paper was Algorithm 1, in its LaTeX source; that the student proposes in blocks of 5 and that K is 25 are taken
    from descriptions of it. Blocks are a matter of speed only: the teacher verifies a block in one forward, the first rejected
    token is replaced, and what the student said after it is forgotten and proposed anew. Stop tokens are proposed and verified
    like any other.

    The proposal and the replacement at a position have one uniform each, a function of (seed, turn, sample, position), that of
    the proposal the same as `ModelWriter`'s: at K = V the two write the same text. A text depends neither on `block` nor on
    what else is in the call, as far as the models' arithmetic does not: products round differently in batches of another shape,
    and a draw that falls between two roundings goes the other way. In float32 that is rare (none of 2,400 tokens of two random
    models); in bfloat16 it is not (their texts parted after 16 tokens on average), and what holds there is the distribution.

    Args:
        student, teacher: Transformers causal language models, the student possibly wrapped by PEFT. Weights and heads are read
            anew at each call, in eval mode; modes are restored.
        vocabulary: what they share. Only its tokens are written.
        stop_token_ids: which end a text. Those that the two do not share cannot occur.
        verify_top_k: K, 0 to any.
        block: tokens that are proposed before the teacher is asked.
        teacher_sampling: how a replacement is drawn; its length plays no part. The student's way is given with each call.
        batch_size: texts that are written side by side.
        student_context, teacher_context: what their forwards run in, such as autocast, or the base of an adapted student as the
            teacher (`teachers.base.without_adapter`).

    Raises:
        ConfigError: K, block or batch_size out of range.
        VocabularyError: stop tokens are given, and none of them is shared.
        CapabilityError: a model's cache cannot be rewound.
    """

    def __init__(
        self,
        student: Any,
        teacher: Any,
        vocabulary: SharedVocabulary,
        stop_token_ids: Sequence[int],
        verify_top_k: int = 25,
        block: int = 5,
        teacher_sampling: Sampling | None = None,
        batch_size: int = ROWS_AT_ONCE,
        student_context: _Context = nullcontext,
        teacher_context: _Context = nullcontext,
    ) -> None:
        for name, value, least in (("verify_top_k", verify_top_k, 0), ("block", block, 1), ("batch_size", batch_size, 1)):
            if value < least:
                raise ConfigError(f"{name} is {value}", f"Use {least} or more")
        self.vocabulary, self.verify_top_k, self.block, self.batch_size = vocabulary, verify_top_k, block, batch_size
        self._ids = torch.arange(vocabulary.size) if vocabulary.ids is None else vocabulary.ids
        self._stops = _shared_stops(self._ids, stop_token_ids)
        self._teacher_sampling = teacher_sampling or Sampling()
        device = input_device(student, torch.device("cpu"))
        self._student = _Speaker(student, vocabulary, device, student_context)
        self._teacher = _Speaker(teacher, vocabulary, input_device(teacher, device), teacher_context)
        for speaker, name in ((self._student, "student"), (self._teacher, "teacher")):
            speaker.check(name)

    def write(self, prompts: Sequence[Prompt], sampling: Sampling, draws: Draws) -> list[Completion]:
        """See `Writer.write`; `sampling` is the student's, and its limit the completion's, which ends at the last position that
        both models have: a prompt that fills them all gets a completion without tokens.

        Raises:
            DataError: a prompt is empty.
            VocabularyError: a prompt holds a token that the two do not share.
        """
        self._refuse(prompts)
        positions = min(self._student.positions, self._teacher.positions)
        limits = [min(sampling.max_completion_length, positions - len(prompt.token_ids)) for prompt in prompts]
        found = {number: _NOTHING for number, limit in enumerate(limits) if limit < 1}
        order = [number for number, limit in enumerate(limits) if limit >= 1]
        order.sort(key=lambda number: len(prompts[number].token_ids))  # little padding
        with in_eval_mode(self._student.model), in_eval_mode(self._teacher.model):
            for start in range(0, len(order), self.batch_size):
                some = order[start : start + self.batch_size]
                texts = _Texts([prompts[number] for number in some], [limits[number] for number in some])
                self._finish(texts, sampling, draws)
                found.update(zip(some, texts.completions(), strict=True))
        return [found[number] for number in range(len(prompts))]

    def _finish(self, texts: "_Texts", sampling: Sampling, draws: Draws) -> None:
        student, teacher = (speaker.begin(texts.unfinished(), texts.longest) for speaker in (self._student, self._teacher))
        while len(texts.open):  # both have read all but the last token of each, always
            steps = min(self.block if self.verify_top_k else 1, texts.most_left)  # with K = 0 the first one is rejected
            chances = texts.chances(draws, steps)
            proposed = self._proposed(student, texts.last, sampling, chances[..., 0])
            offered, accepted = self._verified(teacher, texts.last, proposed, chances[..., 1])
            rows, kept = texts.take(self._ids[offered], accepted, torch.isin(offered, self._stops))
            student.reader.keep(rows, kept)
            teacher.reader.keep(rows, kept)

    def _proposed(self, student: "_Begun", last: Tensor, sampling: Sampling, chances: Tensor) -> Tensor:
        """[B] last tokens and [B, n] uniforms -> [B, n] indices of the shared axis, on the CPU."""
        token, found = last, []
        for chance in chances.to(student.device).unbind(-1):
            found.append(draw(student.signal(student.read(token[:, None])[:, 0]).logits, sampling, chance))
            token = self._ids.to(student.device)[found[-1]]
        return torch.stack(found, -1).cpu()

    def _verified(self, teacher: "_Begun", last: Tensor, proposed: Tensor, chances: Tensor) -> tuple[Tensor, Tensor]:
        """[B, n] proposals with the first rejected one of each row replaced, and [B], how many stand before it."""
        count, steps = proposed.shape
        hidden = teacher.read(torch.cat([last[:, None], self._ids[proposed[:, :-1]]], -1)).flatten(0, 1)
        asked = proposed.flatten().to(teacher.device)
        step = max(1, _LOGITS_BYTES // (4 * self.vocabulary.size))
        pieces = zip(hidden.split(step), asked.split(step), strict=True)
        verdicts = [teacher.signal(states).in_top_k(ids, self.verify_top_k) for states, ids in pieces]
        accepted = torch.cat(verdicts).view(count, steps).long().cumprod(-1).sum(-1).cpu()
        rejected = (accepted < steps).nonzero()[:, 0]
        if not len(rejected):
            return proposed, accepted
        place = accepted[rejected]
        signal = teacher.signal(hidden[(rejected * steps + place).to(hidden.device)])
        own = draw(signal.logits, self._teacher_sampling, chances[rejected, place].to(teacher.device))
        return proposed.index_put((rejected, place), own.cpu()), accepted

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


class _Texts:
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

    def __init__(self, model: Any, vocabulary: SharedVocabulary, device: torch.device, context: _Context) -> None:
        self.model, self._vocabulary, self._device, self._context = model, vocabulary, device, context
        self.positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31

    def check(self, name: str) -> None:
        with in_eval_mode(self.model), self._context():
            check_rewinding(self.model.get_decoder(), name, self._device)

    def begin(self, starts: Sequence[Tensor], longest: int) -> "_Begun":
        with self._context():
            head = self._vocabulary.restrict(LMHead.from_model(self.model))
            reader = RewindingReader(self.model.get_decoder(), starts, longest, self._device)
        return _Begun(reader, head, self._device, self._context)


class _Begun:
    """A model in the middle of some texts."""

    def __init__(self, reader: RewindingReader, head: LMHead, device: torch.device, context: _Context) -> None:
        self.reader, self.device, self._head, self._context = reader, device, head_on(head, device), context

    def read(self, tokens: Tensor) -> Tensor:
        with self._context():
            return self.reader.read(tokens)

    def signal(self, hidden: Tensor) -> DenseSignal:
        """[n, H] -> the distributions over the shared axis."""
        return HiddenTeacher(hidden, self._head).signal(torch.arange(len(hidden), device=hidden.device))
